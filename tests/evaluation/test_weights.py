"""Weights are found where the user or the library keeps them; else one line says which file to put where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cachequant.errors import UserError
from cachequant.evaluation import weights
from cachequant.evaluation.extra import require
from cachequant.evaluation.weights import ALEXNET, CLIP_TAG, INCEPTION, WeightFile, find_clip_weights, find_weights
from cachequant.storage import file_hash


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, an empty cache, and no variable."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv(weights.VARIABLE, raising=False)


def _file(folder: Path) -> WeightFile:
    """Some content under the name that publishes its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "x").write_bytes(b"values")
    digest = file_hash(folder / "x")[:8]
    (folder / "x").rename(folder / f"net-{digest}.pth")
    return WeightFile(f"net-{digest}.pth", "https://example.org/net", "the test")


@pytest.mark.parametrize("file", [INCEPTION, ALEXNET])
def test_offline_the_line_names_the_file_its_source_and_where_to_put_it(file: WeightFile, tmp_path: Path) -> None:
    for folder, place in ((None, tmp_path / "hub" / "checkpoints"), (tmp_path / "mine", tmp_path / "mine")):
        with pytest.raises(UserError) as caught:
            find_weights(file, folder)
        text = str(caught.value)
        assert "\n" not in text and all(word in text for word in (file.name, file.url, str(place)))


def test_the_users_folder_comes_first_then_the_variable_then_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [tmp_path / name for name in ("mine", "variable", "hub/checkpoints")]
    file = [_file(place) for place in places].pop()
    assert find_weights(file) == places[2] / file.name
    monkeypatch.setenv(weights.VARIABLE, str(places[1]))
    assert find_weights(file) == places[1] / file.name
    assert find_weights(file, places[0]) == places[0] / file.name


def test_a_file_of_other_content_is_refused(tmp_path: Path) -> None:
    file = _file(tmp_path)
    with open(tmp_path / file.name, "ab") as handle:
        handle.write(b"!")
    with pytest.raises(UserError, match="is damaged"):
        find_weights(file, tmp_path)


def test_a_download_lands_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    file = _file(source)

    def fetch(url: str, target: str, hash_prefix: str) -> None:
        assert url == file.url and file.name.endswith(f"{hash_prefix}.pth")
        Path(target).write_bytes((source / file.name).read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert find_weights(file) == tmp_path / "hub" / "checkpoints" / file.name


def test_clip_takes_a_local_file_or_the_hubs_tag(tmp_path: Path) -> None:
    assert find_clip_weights() == CLIP_TAG
    with pytest.raises(UserError, match=r"open_clip_model\.safetensors"):
        find_clip_weights(tmp_path)
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"")
    assert find_clip_weights(tmp_path) == str(tmp_path / "open_clip_pytorch_model.bin")


def test_a_missing_library_is_one_line() -> None:
    with pytest.raises(UserError, match=r"needs no_such_library.*pip install 'cachequant\[eval\]'"):
        require("no_such_library")
