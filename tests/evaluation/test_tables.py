"""The paper's tables as data: they load, their rows are configurations, and what is derived is the arithmetic it says."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from cachequant.config import load_config, repository_folder
from cachequant.errors import UserError
from cachequant.evaluation import tables
from cachequant.evaluation.suite import METRICS
from cachequant.evaluation.table_figure import table_figure
from cachequant.evaluation.tables import TITLES, Comparison, Part, Row, derived, read_miniature, read_table, table_names

PARTS = [part for name in table_names() for part in read_table(name)]
PART = Part(
    "toy", "A toy", "configs/fashion.yaml", 10, ("fid",), "fashion",
    (
        Row("full", (), {"fid": 3.0, "speedup": 1.0}, "P"),
        Row("bad", ("method=naive",), {"fid": 15.0, "speedup": 8.0}, "P"),
        Row("good", ("method=paper",), {"fid": 6.0, "speedup": 8.5}, "F", ("speedup",)),
        Row("quoted", None, {"fid": 4.0}, "S"),
    ),
    naive="bad",
)  # fmt: skip
OURS = {
    "full": {"fid": 2.0, "seconds": 4.0, "bytes": 800.0, "bops": 64.0},
    "bad": {"fid": 10.0, "seconds": 1.0, "bytes": 200.0, "bops": 4.0},
    "good": {"fid": 4.0, "seconds": 0.5, "bytes": 200.0, "bops": 4.0},
}


def test_there_are_the_papers_tables() -> None:
    assert set(table_names()) == {"imagenet", "sd", "cifar", "bedroom", "church", "dit", "ablation"}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_row_is_a_configuration_of_its_model_and_of_its_miniature(part: Part) -> None:
    stand_in = read_miniature(part.miniature)
    for row in part.rows:
        assert set(row.paper) <= {*TITLES, "bops"}
        assert bool(row.paper) == bool(row.source)
        for config in (part.config, stand_in.config):
            load_config(repository_folder() / config, list(row.set or ()))
    assert set(part.metrics) <= set(METRICS)
    assert set(stand_in.metrics) | set(stand_in.paired) <= set(METRICS)
    load_config(repository_folder() / stand_in.config, list(part.miniature_set))


def test_shares_of_the_damage_are_those_that_the_paper_is_quoted_with() -> None:
    """57, 68 and 75 % at N = 20, as derived elsewhere from the same figures."""
    (part,) = read_table("ablation")
    removed = {name: row.get("removed") for name, row in Comparison.of(part, {}, "fid", "here").paper.items()}
    shares = [removed[name] for name in ("+ DPS", "+ DPS + DEC", "+ DPS + DEC + recon")]
    assert [round(100 * share) for share in shares if share is not None] == [57, 68, 75]


def test_ratios_are_against_full_and_given_figures_stay() -> None:
    found = derived({**OURS, "good": {**OURS["good"], "speedup": 99.0}}, "fid", "bad")
    assert found["bad"]["speedup"] == 4.0 and found["good"]["speedup"] == 99.0
    assert found["good"]["size"] == 4.0 and found["good"]["bops_saved"] == 16.0
    assert found["good"]["removed"] == pytest.approx(1 - (4 - 2) / (10 - 2))
    assert "removed" not in found["full"] and "removed" not in found["bad"]
    clip = derived({"full": {"clip": 27.0}, "x": {"clip": 26.5}}, "clip", None)
    assert clip["x"]["clip_change"] == -0.5


def test_text_and_csv_hold_ours_the_papers_and_the_difference() -> None:
    comparison = Comparison.of(PART, OURS, "fid", "here")
    assert comparison.values("good", "fid") == (4.0, 6.0, -2.0)
    assert comparison.values("quoted", "fid") == (None, 4.0, None)
    lines = comparison.text().splitlines()
    good = next(line for line in lines if line.startswith("good")).split()
    assert good[1:4] == ["4.00", "6.00", "-2.00"] and "~8.50" in good and good[-1] == "F"
    assert "-0" not in good and "75" in good and "%" in good
    rows = list(csv.DictReader(io.StringIO(tables.to_csv([comparison]))))
    (line,) = [r for r in rows if r["row"] == "good" and r["quantity"] == "speedup"]
    assert (float(line["ours"]), float(line["paper"]), float(line["difference"])) == (8.0, 8.5, -0.5)
    assert {r["row"] for r in rows} == {"full", "bad", "good", "quoted"}


def test_a_miniature_has_no_difference_to_another_metric() -> None:
    ours = {name: {"frechet_fashion_cnn": row["fid"], "seconds": row["seconds"]} for name, row in OURS.items()}
    comparison = Comparison.of(PART, ours, "frechet_fashion_cnn", "here")
    assert comparison.values("good", "fid")[0] is None and comparison.values("good", "frechet_fashion_cnn")[1] is None
    assert comparison.values("good", "removed") == (pytest.approx(0.75), pytest.approx(0.75), pytest.approx(0.0))


def test_the_plot_has_a_point_where_both_numbers_are() -> None:
    left, right = table_figure([Comparison.of(PART, OURS, "fid", "here")]).axes

    def drawn(axes: object) -> dict[str, tuple[float, float]]:
        lines = axes.get_lines()  # type: ignore[attr-defined]
        return {
            str(one.get_label()): (one.get_xdata()[0], one.get_ydata()[0])
            for one in lines
            if one.get_marker() != "None"
        }

    assert drawn(left) == {"full": (1.0, 2.0), "bad": (4.0, 10.0), "good": (8.0, 4.0)}
    assert drawn(right) == {"full": (1.0, 3.0), "bad": (8.0, 15.0), "good": (8.5, 6.0)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parts: []", "has no parts"),
        ("parts: [{name: x}]", "lacks keys"),
        ("parts: [{name: x, colour: red}]", "unknown key colour"),
        ("parts: [{name: x, title: x, config: x, images: 1, metrics: [fid], miniature: x, rows: [{name: a}]}]",
         "row 'full' occurs 0 times"),
        ("parts: [{name: x, rows: [{name: full, paper: {fid: good}}]}]", "figure 'good', expected a number"),
        ("- 1", "holds a list"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(tables, "tables_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        read_table("new")
    assert "\n" not in str(raised.value)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="expected one of ablation, bedroom"):
        read_table("mnist")
    with pytest.raises(UserError, match="expected one of fashion"):
        read_miniature("mnist")


def test_rows_without_any_figure_of_ours_stay_in_the_text() -> None:
    part = replace(PART, rows=PART.rows[:1])
    assert "full" in Comparison.of(part, {}, "fid", "here").text()
