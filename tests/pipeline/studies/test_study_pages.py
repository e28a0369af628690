"""`cachequant report --study`: the page, its files, and what a user may get wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import cachequant as cq
from cachequant.cli import main
from cachequant.config import RunConfig, config_to_dict
from cachequant.pipeline.context import Context
from cachequant.pipeline.stages import Stages
from cachequant.pipeline.studies.findings import Findings, Table, write_study
from cachequant.pipeline.studies.registry import STUDIES

Configure = Callable[..., RunConfig]


@pytest.fixture
def plan(weights_file: Path, configure: Configure, tmp_path: Path) -> Path:
    """A run folder of the toy model with a plan."""
    config = configure(f"model.path={weights_file}", "method=paper", "quant.enabled=false")
    Stages.at(Context.of(cq.load_pipeline(weights_file, "cpu"), config), tmp_path / "run", quiet=True).save_plan()
    return tmp_path / "run"


def test_a_page_holds_tables_and_figures_and_lies_beside_its_files(
    weights_file: Path, configure: Configure, tmp_path: Path
) -> None:
    context = Context.of(cq.load_pipeline(weights_file, "cpu"), configure())
    figure = Figure()
    figure.subplots().plot([1, 2])
    table = Table("Numbers <1>", ("name", "value"), [["first", "1.5"], ["second & last", "22"]])
    long = Table("Everything", ("name",), [["only here"]])
    found = Findings(
        "A title", [("Note", "text")], [table], {"What it shows": figure}, {"value": 1.5}, {"fact": "yes"}, [long]
    )
    page, numbers, picture = write_study(found, context, tmp_path / "study.html")
    text = page.read_text()
    assert "<h2>Numbers &lt;1&gt;</h2>" in text and "second &amp; last" in text and "What it shows" in text
    assert "only here" in text and "only here" not in found.text()
    assert set(re.findall(r"(?:src|href)=\"(\w+:)", text)) == {"data:"}
    record = json.loads(numbers.read_text())
    assert (
        record["value"] == 1.5
        and record["facts"]["fact"] == "yes"
        and record["config"] == config_to_dict(context.config)
    )
    assert picture.name == "study-what-it-shows.png"
    Image.open(picture).verify()
    assert table.text().splitlines() == [
        "Numbers <1>", "name           value", "─────────────  ─────", "first            1.5", "second & last     22",
    ]  # fmt: skip


def test_a_plan_is_studied_from_its_run_folder(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = tmp_path / "note.json"
    common = ["--study", "error", "--count", "2", "--device", "cpu"]
    assert main(["report", str(plan), *common, "--json", str(note)]) == 0
    record = json.loads(note.read_text())
    assert record["page"] == str(plan / "study-error.html") and all(Path(file).is_file() for file in record["files"])
    assert set(record["rows"]) == {"uncorrected", "paper"}
    assert "Errors\n" in capsys.readouterr().out
    assert main(["report", str(next(plan.glob("plan-*"))), *common, "--out", str(tmp_path / "own.html")]) == 0
    again = json.loads((tmp_path / "own.json").read_text())
    assert again["rows"] == record["rows"]


def test_a_configuration_is_studied_with_overrides(weights_file: Path, tmp_path: Path) -> None:
    settings = ["sampler.steps=6", "cache.interval=2", "calibration.samples=2", "calibration.batch_size=2",
                "quant.enabled=false", f"model.path={weights_file}", f"output={tmp_path}", "model.name=toy"]  # fmt: skip
    arguments = [word for item in settings for word in ("--set", item)]
    command = ["report", "configs/fashion.yaml", "--study", "memory", "--count", "2", "--device", "cpu", *arguments]
    assert main(command) == 0
    assert (tmp_path / "toy" / "study-memory.html").is_file()
    record = json.loads((tmp_path / "toy" / "study-memory.json").read_text())
    assert record["config"]["cache"]["interval"] == 2 and set(record["samples"]) == {"1", "2"}


def test_mistakes_are_one_line(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--study", "errors"],
        ["--study", "error", "--set", "cache.interval=3"],
        ["--study", "error", "--count", "0"],
        ["--set", "cache.interval=3"],
    ):
        assert main(["report", str(plan), "--device", "cpu", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 4
    assert f"expected one of {', '.join(STUDIES)}" in lines[0] and "with a plan" in lines[1]
    assert "expected 1 or more" in lines[2] and "without --study" in lines[3]


def test_a_plan_of_another_model_is_refused(
    plan: Path, weights_file: Path, pipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        pipe.unet.conv_in.weight.add_(1)
    pipe.save_pretrained(weights_file)  # in the place of the one that the plan was made for
    assert main(["report", str(plan), "--study", "error", "--count", "2", "--device", "cpu"]) == 2
    assert "error: this pipeline's weights is" in capsys.readouterr().err
    assert not (plan / "study-error.html").exists()
