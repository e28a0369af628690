"""Grids of images: every pixel where it belongs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cachequant.evaluation.grid import FONT_SIZE, GAP, difference, image_grid, save_image


def random_images(n: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images [n, C, H, W] whose values are multiples of 1/255, so that bytes hold them exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, height, width), generator=generator) / 255


def cut(grid: Image.Image, row: int, column: int, n: int, size: tuple[int, int], pitch: int) -> np.ndarray:
    """The pixels of one tile of `size` (height, width)."""
    height, width = size
    left = grid.width - (n - column) * (width + GAP)
    top = GAP + row * pitch
    return np.asarray(grid)[top : top + height, left : left + width]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_every_image_is_recovered_by_slicing(channels: int, scale: int) -> None:
    images = {"full": random_images(4, channels, 24, 20), "cachequant": random_images(4, channels, 24, 20, 1)}
    grid = image_grid(images, scale)
    assert grid.mode == ("L" if channels == 1 else "RGB")
    for i, batch in enumerate(images.values()):
        for j, image in enumerate(batch):
            tile = cut(grid, i, j, 4, (24 * scale, 20 * scale), 24 * scale + GAP)
            expected = (image * 255).round().byte().permute(1, 2, 0).squeeze(2).numpy()
            np.testing.assert_array_equal(tile, expected.repeat(scale, 0).repeat(scale, 1))


def test_tiles_are_parted_by_white() -> None:
    pixels = np.asarray(image_grid({"a": torch.zeros(3, 1, 24, 20), "b": torch.zeros(3, 1, 24, 20)}, 1))
    assert pixels.shape[0] == GAP + 2 * (24 + GAP)
    gaps = [pixels[:GAP], pixels[GAP + 24 : 2 * GAP + 24], pixels[-GAP:], pixels[:, -GAP:]]
    gaps.append(pixels[:, -(20 + 2 * GAP) : -(20 + GAP)])
    assert all((gap == 255).all() for gap in gaps)


def test_each_row_has_its_label_at_the_left() -> None:
    black = torch.zeros(2, 1, 32, 32)
    grid = image_grid({"naive": black, "": black, "dps": black}, 1)
    gutter = np.asarray(grid)[:, : grid.width - 2 * (32 + GAP)]
    bands = [gutter[GAP + i * (32 + GAP) : GAP + i * (32 + GAP) + 32] for i in range(3)]
    assert [bool((band < 128).any()) for band in bands] == [True, False, True]
    rows_with_ink = np.flatnonzero((bands[0] < 128).any(axis=1))
    assert abs(rows_with_ink.mean() - 15.5) < 4  # centred on its images
    for edge in (gutter[:, :4], gutter[:, -4:]):
        assert (edge == 255).all()  # never cut, never over an image


def test_small_images_leave_room_for_their_label() -> None:
    grid = image_grid({"a": torch.zeros(1, 1, 4, 4), "b": torch.zeros(1, 1, 4, 4)}, 1)
    pitch = (grid.height - GAP) // 2
    assert pitch >= FONT_SIZE + GAP
    for i in range(2):
        assert (cut(grid, i, 0, 1, (4, 4), pitch) == 0).all()


def test_values_beyond_the_range_are_clamped_and_nan_is_black() -> None:
    image = torch.tensor([-1.0, 2.0, float("nan"), 0.5]).view(1, 1, 1, 4).repeat(1, 1, 32, 1)
    tile = cut(image_grid({"a": image}, 1), 0, 0, 1, (32, 4), 32 + GAP)
    np.testing.assert_array_equal(tile, np.tile([0, 255, 0, 128], (32, 1)))


def test_difference_is_amplified_symmetric_and_clamped() -> None:
    a, b = torch.tensor([0.5, 0.5, 0.0, 0.2]), torch.tensor([0.5, 0.6, 1.0, 0.1])
    torch.testing.assert_close(difference(a, b), torch.tensor([0.0, 0.3, 1.0, 0.3]))
    torch.testing.assert_close(difference(a, b), difference(b, a))


@pytest.mark.parametrize(
    "images",
    [
        {},
        {"a": torch.zeros(2, 1, 8, 8), "b": torch.zeros(3, 1, 8, 8)},
        {"a": torch.zeros(2, 2, 8, 8)},
        {"a": torch.zeros(1, 8, 8)},
    ],
)
def test_what_makes_no_grid_is_refused(images: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="expected one shape"):
        image_grid(images)


def test_a_saved_grid_reads_back_and_leaves_nothing_else(tmp_path: Path) -> None:
    grid = image_grid({"full": random_images(2, 3, 16, 16)})
    save_image(grid, tmp_path / "out" / "grid.png")
    with Image.open(tmp_path / "out" / "grid.png") as read:
        assert read.format == "PNG"
        np.testing.assert_array_equal(np.asarray(read), np.asarray(grid))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["grid.png"]
