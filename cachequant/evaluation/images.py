"""Sets of images to evaluate, read in parts: a folder of pictures, shards, a safetensors file, or an .npz batch."""

from __future__ import annotations

import re
import weakref
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cachequant.errors import UserError
from cachequant.shards import ShardSet, to_uint8

PICTURES = (".png", ".jpg", ".jpeg")


class ImageSet(Protocol):
    """Images in a fixed order."""

    @property
    def count(self) -> int:
        """How many."""
        ...

    @property
    def first_seed(self) -> int | None:
        """Seed of image 0 where image i was drawn from seed first_seed + i, else None."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Images start … stop - 1: [n, 3, H, W] uint8; grey ones have three equal channels.

        Raises:
            UserError: a file is missing, damaged, or of another size than the rest.
        """
        ...


def open_images(path: Path, resize: int | None = None) -> ImageSet:
    """The images at `path`.

    Args:
        path: a folder of PNG or JPEG files (sub-folders too, in natural order of their names), a folder of shards that
            `cachequant sample` wrote, `images.safetensors` with [n, C, H, W] in [0, 1] or uint8, or an .npz whose arr_0
            is [n, H, W, C] uint8 (guided-diffusion's batches).
        resize: cut every image to its central square and resize that to this many pixels (bicubic).

    Raises:
        UserError: none of these, or no image in it.
    """
    images = _open(path)
    if images.count < 1:
        raise UserError(f"{path} holds no image: expected at least one")
    return images if resize is None else Resized(images, resize)


def _open(path: Path) -> ImageSet:
    if path.is_dir():
        return Shards(path) if (path / "set.json").is_file() else Pictures(path)
    if path.suffix == ".safetensors" and path.is_file():
        return TensorFile(path)
    if path.suffix == ".npz" and path.is_file():
        return Batch(path)
    raise UserError(
        f"no images at {path}: expected a folder of PNG or JPEG files, of shards of `cachequant sample`, "
        "an images.safetensors or an .npz"
    )


class Pictures:
    """PNG and JPEG files of a folder."""

    first_seed: int | None = None

    def __init__(self, folder: Path) -> None:
        self.paths = sorted((p for p in folder.rglob("*") if p.suffix.lower() in PICTURES), key=_natural)
        self.count = len(self.paths)

    def read(self, start: int, stop: int) -> Tensor:
        """[n, 3, H, W] uint8."""
        return _stack(self.pictures(start, stop), [str(p) for p in self.paths[start:stop]])

    def pictures(self, start: int, stop: int) -> list[Image.Image]:
        """The same images as they are, each of its own size."""
        return [_read_picture(path) for path in self.paths[start:stop]]


class Shards:
    """Images of `cachequant sample`."""

    def __init__(self, folder: Path) -> None:
        self.set = ShardSet.open(folder)
        self.count, self.first_seed = self.set.count, self.set.first
        missing = [shard for shard in self.set.shards() if not (folder / shard.name).is_file()]
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of its files such as {missing[0].name}: finish it with the same "
                "`cachequant sample` command"
            )
        self._held: tuple[int, Tensor] | None = None

    def read(self, start: int, stop: int) -> Tensor:
        """[n, 3, H, W] uint8."""
        shards, size = self.set.shards(), self.set.size
        parts = []
        for i in range(start // size, (stop - 1) // size + 1):
            if self._held is None or self._held[0] != i:
                self._held = i, self.set.load(shards[i])
            parts.append(self._held[1][max(0, start - i * size) : stop - i * size])
        return _rgb(torch.cat(parts))


class TensorFile:
    """`images` of a safetensors file."""

    first_seed: int | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                self.count = int(file.get_slice("images").get_shape()[0])
        except (SafetensorError, OSError, IndexError) as error:
            raise UserError(f"{path} is no tensor file with `images` [n, C, H, W] ({str(error)[:80]})") from None

    def read(self, start: int, stop: int) -> Tensor:
        """[n, 3, H, W] uint8."""
        with safe_open(self.path, "pt") as file:
            images: Tensor = file.get_slice("images")[start:stop]
        return _rgb(images if images.dtype == torch.uint8 else to_uint8(images))


class Batch:
    """arr_0 of an .npz, read through its zip member without unpacking the rest; the file may be larger than memory."""

    first_seed: int | None = None

    def __init__(self, path: Path, name: str = "arr_0") -> None:
        self.path = path
        self._stream = _member(self, path, name)
        shape, fortran, dtype = _header(self._stream)
        self._offset = self._stream.tell()
        if len(shape) != 4 or shape[3] not in (1, 3) or dtype != np.uint8 or fortran:
            raise UserError(f"{name} of {path} is {dtype} {list(shape)}, expected uint8 [n, H, W, 1 or 3] in C order")
        self.count, self._shape = shape[0], shape[1:]

    def read(self, start: int, stop: int) -> Tensor:
        """[n, 3, H, W] uint8."""
        size = int(np.prod(self._shape))
        self._stream.seek(self._offset + start * size)
        content = self._stream.read((stop - start) * size)
        if len(content) != (stop - start) * size:
            raise UserError(f"{self.path} is cut short at image {start}: fetch it again")
        images = np.frombuffer(content, np.uint8).reshape(-1, *self._shape)  # [n, H, W, C]
        return _rgb(torch.from_numpy(images.copy()).permute(0, 3, 1, 2))


@dataclass
class Resized:
    """Central squares of other images, resized: what the paper does to Stable Diffusion's and COCO's before FID (300)."""

    inner: ImageSet
    size: int

    @property
    def count(self) -> int:
        """How many."""
        return self.inner.count

    @property
    def first_seed(self) -> int | None:
        """Of the inner set."""
        return self.inner.first_seed

    def read(self, start: int, stop: int) -> Tensor:
        """[n, 3, size, size] uint8."""
        if isinstance(self.inner, Pictures):
            pictures = self.inner.pictures(start, stop)
        else:
            pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in self.inner.read(start, stop)]
        squares = [_square(picture, self.size) for picture in pictures]
        return torch.stack([_tensor(square) for square in squares])


def _square(picture: Image.Image, size: int) -> Image.Image:
    """The central square of a picture, resized by bicubic interpolation."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key under which 2.png comes before 10.png."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path)) if part]


def _read_picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no readable picture ({str(error)[:80]}): remove or replace it") from None


def _tensor(picture: Image.Image) -> Tensor:
    """[3, H, W] uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _stack(pictures: Sequence[Image.Image], names: Sequence[str]) -> Tensor:
    for picture, name in zip(pictures, names, strict=True):
        if picture.size != pictures[0].size:
            raise UserError(
                f"{name} has {picture.width}×{picture.height} pixels, {names[0]} {pictures[0].width}×{pictures[0].height}: "
                "expected one size, or --resize N to cut and resize them all"
            )
    return torch.stack([_tensor(picture) for picture in pictures])


def _rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _member(owner: object, path: Path, name: str) -> Any:
    """A zip member as a stream that can seek, closed when its owner goes; forward seeks decompress at most."""
    try:
        archive = zipfile.ZipFile(path)
        weakref.finalize(owner, archive.close)
        return archive.open(f"{name}.npy")
    except KeyError:
        raise UserError(f"{path} has no {name}: expected a guided-diffusion batch with images") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no .npz file ({error}): fetch it again") from None


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of an .npy stream, which then stands at its first value."""
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        return np.lib.format.read_array_header_2_0(stream)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{stream.name} is damaged ({str(error)[:80]}): fetch it again") from None
