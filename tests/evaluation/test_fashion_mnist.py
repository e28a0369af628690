"""Reading Fashion-MNIST: the folders it is found in, and files that are not what they should be."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cachequant.errors import UserError
from cachequant.evaluation import fashion_mnist
from cachequant.evaluation.fashion_mnist import load_fashion_mnist, to_model_range

LENGTH = 12
IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twelve images a split, and none of the machine's own copies."""
    monkeypatch.setattr(fashion_mnist, "_LENGTH", {"train": LENGTH, "test": LENGTH})
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.delenv(fashion_mnist.FOLDER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def idx(*shape: int, start: int = 0) -> bytes:
    size = int(torch.tensor(shape).prod())
    values = bytes((start + i) % 256 for i in range(size))
    return struct.pack(f">I{len(shape)}I", 0x0800 + len(shape), *shape) + values


def write(folder: Path, packed: bool = False, start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((IMAGES, idx(LENGTH, 28, 28, start=start)), (LABELS, idx(LENGTH))):
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_values_and_shapes(tmp_path: Path, packed: bool) -> None:
    images, labels = load_fashion_mnist("test", write(tmp_path / "here", packed))
    assert (images.dtype, images.shape) == (torch.uint8, (LENGTH, 28, 28))
    assert images.flatten()[:300].tolist() == [i % 256 for i in range(300)]
    assert (labels.dtype, labels.tolist()) == (torch.uint8, list(range(LENGTH)))


def test_places_are_tried_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first() -> int:
        return int(load_fashion_mnist("test")[0].flatten()[0])

    write(tmp_path / "data" / "FashionMNIST" / "raw", start=4)
    assert first() == 4
    write(tmp_path / "debian", packed=True, start=3)
    assert first() == 3
    monkeypatch.setenv(fashion_mnist.FOLDER_VARIABLE, str(write(tmp_path / "variable", start=2)))
    assert first() == 2
    torchvision_root = tmp_path / "given"
    write(torchvision_root / "FashionMNIST" / "raw", start=1)
    assert int(load_fashion_mnist("test", torchvision_root)[0].flatten()[0]) == 1


def test_absent_data_says_how_to_get_it(tmp_path: Path) -> None:
    write(tmp_path / "debian")
    with pytest.raises(UserError, match="apt install dataset-fashion-mnist") as caught:
        load_fashion_mnist("test", tmp_path / "nothing")  # a named folder is not passed over for Debian's
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="t10k-labels"):
        folder = write(tmp_path / "half")
        (folder / LABELS).unlink()
        load_fashion_mnist("test", folder)
    with pytest.raises(UserError, match="'validation'"):
        load_fashion_mnist("validation")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "idx header"),
        (b"\x00\x00\x09\x03" + idx(LENGTH, 28, 28)[4:], "idx header"),  # signed bytes
        (idx(LENGTH - 1, 28, 28), "idx header"),
        (idx(LENGTH, 28, 28)[:-1], "holds 9407 values; expected 9408"),
        (idx(LENGTH, 28, 28) + b"\x00", "holds 9409 values"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    folder = write(tmp_path / "here")
    (folder / IMAGES).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_fashion_mnist("test", folder)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:50], lambda b: b"no gzip", lambda b: b[:40] + b"\xff" * 20 + b[60:]],
    ids=["cut short", "not gzip", "overwritten"],
)
def test_damaged_gzip_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = write(tmp_path / "here", packed=True)
    path = folder / f"{IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="cannot be read"):
        load_fashion_mnist("test", folder)


def test_model_range_is_padded_with_black() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).repeat_interleave(28 * 28).view(3, 28, 28)
    scaled = to_model_range(images)
    assert (scaled.dtype, scaled.shape) == (torch.float32, (3, 1, 32, 32))
    torch.testing.assert_close(scaled[:, 0, 2, 2], torch.tensor([-1.0, -0.6, 1.0]))
    assert torch.equal(scaled[:, :, 2:-2, 2:-2].amin((1, 2, 3)), scaled[:, 0, 2, 2])
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert (scaled[:, 0, border] == -1).all()
