"""Images side by side, one labelled row for each way of sampling."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cachequant.storage import write_atomically

GAP = 2
MARGIN = 8
FONT_SIZE = 14
AMPLIFICATION = 3.0


def image_grid(images: dict[str, Tensor], scale: int = 2) -> Image.Image:
    """One row of images for each entry, its label at the left.

    Tiles follow each other every `scale·W + GAP` pixels, the last ending GAP before the right edge. Rows
    follow every `scale·H + GAP`, or further apart where a label is higher than that, from GAP below the top.

    Args:
        images: label -> images [n, C, H, W] in [0, 1], C 1 (grey) or 3, of one shape for all labels. Labels
            are ASCII: the font has little else.
        scale: pixels drawn for each image pixel.

    Raises:
        ValueError: nothing given, or shapes that differ or are not images.
    """
    n, channels, height, width = _common_shape(images)
    font = ImageFont.load_default(FONT_SIZE)
    left = 2 * MARGIN + max(round(font.getlength(label)) for label in images)
    tile_height = max(scale * height, FONT_SIZE + 4)
    size = (left + n * (scale * width + GAP), GAP + len(images) * (tile_height + GAP))
    grid = Image.new("L" if channels == 1 else "RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for i, (label, batch) in enumerate(images.items()):
        top = GAP + i * (tile_height + GAP)
        draw.text((MARGIN, top + tile_height // 2), label, fill="black", font=font, anchor="lm")
        for j, image in enumerate(batch):
            grid.paste(_tile(image, scale), (left + j * (scale * width + GAP), top))
    return grid


def difference(images: Tensor, reference: Tensor) -> Tensor:
    """|images - reference| times 3, clamped to [0, 1]; all of one shape [n, C, H, W] in [0, 1]."""
    return ((images - reference).abs() * AMPLIFICATION).clamp(0.0, 1.0)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically.

    Raises:
        UserError: the folder is not writable or the disk is full.
    """
    write_atomically(path, lambda p: image.save(p, format="PNG"))


def _common_shape(images: dict[str, Tensor]) -> tuple[int, int, int, int]:
    shapes = {tuple(batch.shape) for batch in images.values()}
    if len(shapes) != 1 or any(len(shape) != 4 or shape[1] not in (1, 3) for shape in shapes):
        raise ValueError(f"images of shapes {sorted(shapes)}: expected one shape [n, 1 or 3, H, W]")
    n, channels, height, width = shapes.pop()
    return n, channels, height, width


def _tile(image: Tensor, scale: int) -> Image.Image:
    """One image [C, H, W] in [0, 1] as pixels, each a square of side `scale`; NaN is black."""
    values = image.detach().cpu().float().nan_to_num(0.0).clamp(0.0, 1.0).mul(255).round().byte()
    pixels = values.permute(1, 2, 0).squeeze(2).numpy()  # [H, W] or [H, W, 3]
    tile = Image.fromarray(pixels)
    return tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST)
