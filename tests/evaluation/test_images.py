"""Every kind of image set gives the same images, read in parts; what is no image set is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from cachequant import shards
from cachequant.errors import UserError
from cachequant.evaluation.images import ImageSet, open_images
from cachequant.evaluation.reference import open_reference
from cachequant.shards import ShardSet

COUNT = 11


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """[11, 3, 6, 8] uint8."""
    return torch.randint(0, 256, (COUNT, 3, 6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def sets(pictures: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same pictures in every form."""
    root = tmp_path_factory.mktemp("sets")
    channels_last = pictures.permute(0, 2, 3, 1).numpy()
    (root / "png" / "sub").mkdir(parents=True)
    for i, picture in enumerate(channels_last):
        Image.fromarray(picture).save(root / "png" / "sub" / f"{i}.png")
    (root / "png" / "notes.txt").write_text("not a picture")
    np.savez(root / "stored.npz", arr_0=channels_last, arr_1=np.arange(COUNT))
    np.savez_compressed(root / "packed.npz", arr_0=channels_last)
    save_file({"images": pictures.contiguous()}, root / "bytes.safetensors")
    save_file({"images": pictures.float() / 255}, root / "floats.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "IMAGES", 4)
        several = shards.ShardSet.create(root / "shards", {}, 70, COUNT, 2)
    for shard in several.shards():
        first = shard.first - 70
        several.write(shard, pictures[first : first + shard.count].float() / 255)
    names = ("png", "stored.npz", "packed.npz", "bytes.safetensors", "floats.safetensors", "shards")
    return {name: root / name for name in names}


@pytest.mark.parametrize(
    "name", ["png", "stored.npz", "packed.npz", "bytes.safetensors", "floats.safetensors", "shards"]
)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_parts_in_any_order_are_the_pictures(
    name: str, data: st.DataObject, sets: dict[str, Path], pictures: Tensor
) -> None:
    images = open_images(sets[name])
    assert images.count == COUNT and images.first_seed == (70 if name == "shards" else None)
    for _ in range(3):
        start = data.draw(st.integers(0, COUNT - 1))
        stop = data.draw(st.integers(start + 1, COUNT))
        assert torch.equal(images.read(start, stop), pictures[start:stop])


def test_a_large_batch_is_never_held_whole(tmp_path: Path) -> None:
    """The last two of 8000 images: zipfile skips the others in pieces of 16 MB."""
    import tracemalloc

    np.savez_compressed(tmp_path / "large.npz", arr_0=np.zeros((8000, 64, 64, 3), np.uint8))  # 98 MB unpacked
    tracemalloc.start()
    images = open_images(tmp_path / "large.npz")
    images.read(7998, 8000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_grey_images_have_three_equal_channels(tmp_path: Path) -> None:
    grey = torch.rand(3, 1, 4, 4)
    save_file({"images": grey}, tmp_path / "grey.safetensors")
    read = open_images(tmp_path / "grey.safetensors").read(0, 3)
    assert read.shape == (3, 3, 4, 4) and torch.equal(read[:, 0], read[:, 2])
    assert torch.equal(read[:, 0], (grey[:, 0] * 255).round().byte())


def test_resize_takes_the_central_square_of_pictures_of_any_shape(tmp_path: Path) -> None:
    """A wide picture whose sides differ from its middle: nothing of the sides is left."""
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    Image.fromarray(wide).save(tmp_path / "1.png")
    Image.fromarray(np.full((30, 20, 3), 50, np.uint8)).save(tmp_path / "2.png")
    read = open_images(tmp_path, resize=5).read(0, 2)
    assert torch.equal(read[0], torch.full((3, 5, 5), 200, dtype=torch.uint8))
    assert torch.equal(read[1], torch.full((3, 5, 5), 50, dtype=torch.uint8))
    with pytest.raises(UserError, match="--resize N"):
        open_images(tmp_path).read(0, 2)


def test_resize_is_pillows_bicubic(sets: dict[str, Path], pictures: Tensor) -> None:
    square = pictures[0, :, :, 1:7].permute(1, 2, 0).numpy()  # 6 × 6 of 6 × 8
    expected = np.array(Image.fromarray(square).resize((9, 9), Image.Resampling.BICUBIC))
    for name in ("png", "bytes.safetensors"):
        read = open_images(sets[name], 9).read(0, 1)[0]
        np.testing.assert_array_equal(read.permute(1, 2, 0).numpy(), expected)


def _broken(root: Path) -> dict[str, tuple[Path, str]]:
    """Name -> path and words of the message."""
    (root / "empty").mkdir()
    (root / "bad").mkdir()
    (root / "bad" / "1.png").write_bytes(b"nothing")
    (root / "text.npz").write_bytes(b"not a zip")
    np.savez(root / "other.npz", mu=np.zeros(3))
    np.savez(root / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(root / "cut.npz", arr_0=np.zeros((200, 4, 4, 3), np.uint8))
    content = (root / "cut.npz").read_bytes()
    (root / "cut.npz").write_bytes(content[: len(content) // 2])
    save_file({"pictures": torch.zeros(1, 3, 4, 4)}, root / "names.safetensors")
    (root / "half").mkdir()
    ShardSet.create(root / "half", {}, 0, 8, 4)
    return {
        "absent": (root / "absent", "no images at"),
        "empty": (root / "empty", "holds no image"),
        "bad": (root / "bad", "no readable picture"),
        "text": (root / "text.npz", "no .npz file"),
        "other": (root / "other.npz", "has no arr_0"),
        "float": (root / "float.npz", "expected uint8"),
        "cut": (root / "cut.npz", "no .npz file"),
        "names": (root / "names.safetensors", "no tensor file"),
        "half": (root / "half", "finish it with the same"),
    }


def test_what_is_no_image_set_is_one_line(tmp_path: Path) -> None:
    for path, words in _broken(tmp_path).values():
        with pytest.raises(UserError, match=words) as caught:
            open_images(path).read(0, 1)
        assert "\n" not in str(caught.value)


def test_statistics_of_a_reference_batch_are_read(tmp_path: Path) -> None:
    mu, sigma = np.random.default_rng(0).normal(size=2048), np.eye(2048, dtype=np.float32)
    spatial = {"mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma, **spatial, arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    reference = open_reference(tmp_path / "ref.npz")
    assert set(reference.gaussians) == {"fid", "sfid"} and reference.images is not None and reference.images.count == 3
    np.testing.assert_array_equal(reference.gaussians["fid"][0], mu)
    np.savez(tmp_path / "plain.npz", mu=mu, sigma=sigma)
    assert open_reference(tmp_path / "plain.npz").images is None
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match=r"expected \[2048\]"):
        open_reference(tmp_path / "wrong.npz")
    np.savez(tmp_path / "labels.npz", arr_1=np.zeros(3))
    with pytest.raises(UserError, match="expected arr_0, or mu and sigma"):
        open_reference(tmp_path / "labels.npz")


def test_a_shard_that_was_changed_is_not_read(tmp_path: Path) -> None:
    one = ShardSet.create(tmp_path, {}, 0, 2, 2)
    one.write(one.shards()[0], torch.rand(2, 3, 4, 4))
    path = tmp_path / one.shards()[0].name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    images: ImageSet = open_images(tmp_path)
    with pytest.raises(UserError, match="was changed"):
        images.read(0, 1)
