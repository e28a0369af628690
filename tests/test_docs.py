"""The references in assets/docs are what the code says now, and leave nothing out."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cachequant import plan as plan_module
from cachequant.cli import build_parser
from cachequant.config import RunConfig, repository_folder

ROOT = repository_folder()


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs", ROOT / "scripts" / "docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_current(docs: ModuleType) -> None:
    stale = [name for name, text in docs.pages().items() if (docs.FOLDER / name).read_text(encoding="utf-8") != text]
    assert not stale, f"run python scripts/docs.py: {stale}"
    assert sorted(p.name for p in docs.FOLDER.iterdir()) == sorted(docs.pages())


def test_every_key_has_a_row_and_a_word_in_its_section(docs: ModuleType) -> None:
    page = docs.configuration()
    known = dict(docs.sections(RunConfig))
    assert set(known) >= {"", "model", "sampler", "cache", "schedule", "correction", "quant", "calibration", "sample"}
    for prefix, schema in known.items():
        for field in docs.plain_fields(schema):
            key = f"{prefix}.{field.name}" if prefix else field.name
            assert f"| `{key}` |" in page
            assert f"`{field.name}`" in (inspect.getdoc(schema) or ""), f"{key} is not explained in {schema.__name__}"


def test_every_option_of_every_command_has_a_row(docs: ModuleType) -> None:
    page, commands = docs.command_line(), docs.commands(build_parser())
    assert len(commands) >= 9
    parts = dict(re.findall(r"^## cachequant (\w+)\n(.*?)(?=^## |\Z)", page, flags=re.DOTALL | re.MULTILINE))
    for name, command in commands.items():
        options = re.findall(r"(?<!\w)--[a-z-]+", command.format_help())
        assert options and all(f"`{option}" in parts[name] or option == "--help" for option in options), name


def test_the_record_of_a_plan_is_explained(docs: ModuleType, tmp_path: Path) -> None:
    record = plan_module.load_json(docs.example().save(tmp_path) / "plan.json")
    assert set(record) == set(plan_module.RECORD)
    page = docs.plan_format()
    for field in dataclasses.fields(plan_module.ModelIdentity):
        assert f"| `{field.name}` |" in page


def test_every_tensor_of_the_format_is_explained_by_the_attribute_that_it_holds(docs: ModuleType) -> None:
    page = docs.plan_format()
    for name in (
        "cache.previous",
        "layers.NAME.shift",
        "output.scale",
        "layers.NAME.SEGMENT.weight",
        "layers.NAME.widths",
        "layers.NAME.SEGMENT.weight_format",
        "layers.NAME.SEGMENT.input.format",
        "operands.NAME.query.format",
    ):
        assert f"| `{name}` |" in page
    assert docs.attributes(plan_module.Schedule)["interval"] in page
    for pattern, kind, attribute, _ in itertools.chain(*docs.TENSORS.values()):
        assert docs.attributes(kind)[attribute], pattern


def test_a_tensor_that_is_not_explained_is_refused(docs: ModuleType) -> None:
    for file in ("correction.safetensors", "quant.safetensors"):
        with pytest.raises(KeyError, match=f"{file} holds layers.NAME.0.new"):
            docs.tensor_rows(file, {"layers.NAME.0.new": torch.zeros(1)})
    (row,) = docs.tensor_rows("remainder.safetensors", {"conv_in.bias": torch.zeros(1)})
    assert row.startswith("| `conv_in.bias` | float32, 1 |")


def test_check_says_which_page_is_stale(
    docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["docs.py", "--check"])
    assert docs.main() == 1 and not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["docs.py"])
    assert docs.main() == 0
    monkeypatch.setattr(sys, "argv", ["docs.py", "--check"])
    assert docs.main() == 0
    (tmp_path / "plan-format.md").write_text("old", encoding="utf-8")
    assert docs.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "stale: plan-format.md"
