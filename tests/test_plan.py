"""A plan survives its folder; edited, damaged and impossible ones are refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cachequant.errors import UserError
from cachequant.plan import Plan
from cachequant.storage import (
    content_hash,
    file_hash,
)
from cachequant.types import (
    Schedule,
)
from tests.states import plan, same_correction, same_quant


@pytest.mark.parametrize("quantised", [True, False])
def test_a_plan_survives_its_folder(tmp_path: Path, quantised: bool) -> None:
    saved = plan(quantised=quantised)
    folder = saved.save(tmp_path / "new" / "plan")
    loaded = Plan.load(str(folder))
    for name in ("config", "identity", "timesteps", "schedule", "provenance"):
        assert getattr(loaded, name) == getattr(saved, name), name
    assert same_correction(loaded.correction, saved.correction)
    if saved.quant is None or loaded.quant is None:
        assert loaded.quant is saved.quant
    else:
        assert same_quant(loaded.quant, saved.quant)
    assert sorted(p.name for p in folder.iterdir()) == [
        "correction.safetensors", "plan.json", "quant.safetensors", "remainder.safetensors",
    ]  # fmt: skip
    assert loaded.summary() == saved.summary()


def test_saving_twice_gives_the_same_bytes_and_a_new_plan_replaces_the_old(tmp_path: Path) -> None:
    folder = plan(0).save(tmp_path)
    first = {p.name: file_hash(p) for p in folder.iterdir()}
    Plan.load(folder).save(folder)
    assert {p.name: file_hash(p) for p in folder.iterdir()} == first
    plan(1).save(folder)
    assert same_correction(Plan.load(folder).correction, plan(1).correction)


def edit(path: Path, **changes: Any) -> None:
    """Change plan.json as a person with an editor would, without its checksum."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"timesteps": [900, 700, 500, 300, 101]},
        {"quantised": False},
        {"files": {}},
        {"provenance": {}},
        {"more": 1},
        {"checksum": "0" * 64},
        {"schedule": {"refresh_steps": [0, 2], "num_steps": 5, "interval": 3, "cost": 1, "uniform_cost": 2}},
    ],
    ids=lambda c: next(iter(c)),
)
def test_an_edited_plan_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = plan().save(tmp_path)
    edit(folder / "plan.json", **changes)
    with pytest.raises(UserError, match=r"plan\.json was edited"):
        Plan.load(folder)


def test_white_space_is_no_edit(tmp_path: Path) -> None:
    folder = plan().save(tmp_path)
    edit(folder / "plan.json")
    assert Plan.load(folder).timesteps == plan().timesteps


@pytest.mark.parametrize("name", ["correction.safetensors", "quant.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "other"])
def test_a_damaged_tensor_file_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    folder = plan().save(tmp_path)
    path = folder / name
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "other":
        plan(1).save(tmp_path / "other")
        path.write_bytes((tmp_path / "other" / name).read_bytes())
    else:
        path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing or was changed"):
        Plan.load(folder)


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no plan in"):
        Plan.load(tmp_path)
    for content, message in (
        ("[]", "is not a plan"),
        ("{}", "is not a plan"),
        ('{"schema": 1}', "has schema 1, expected 3"),
        ('{"schema": "3"}', "has schema '3', expected 3"),
        ('{"schema": 3}', "was edited or cut short"),
        ('{"schema": 3,', "is damaged"),
        ("", "is damaged"),
    ):
        (tmp_path / "plan.json").write_text(content)
        with pytest.raises(UserError, match=message):
            Plan.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": {"refresh_steps": [1], "num_steps": 5, "interval": 3}},
        {"schedule": {"refresh_steps": [0]}},
        {"schedule": None},
        {"identity": {"model": "UNet2DModel"}},
        {"config": {"cache": {"intervall": 3}}},
        {"config": {"cache": {"interval": 0}}},
        {"config": []},
        {"timesteps": None},
        {"timesteps": [900, 700, 500, 300]},
        {"timesteps": [900, 700, 500, 300, "100"]},
        {"schedule": {"refresh_steps": [0, 1.5], "num_steps": 5, "interval": 3}},
        {"identity": {"model": 1, "weights": "", "scheduler": "", "guidance": "none"}},
        {"provenance": []},
        {"provenance": {"consumers": [{"name": "conv_in"}]}},
        {"provenance": {"measured": {"dps_seconds": 1, "trajectories_seconds": 0, "ring_bytes": 1}}},
        {"files": []},
    ],
    ids=str,
)
def test_a_plan_of_impossible_values_is_refused_even_with_a_fitting_checksum(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = plan().save(tmp_path) / "plan.json"
    record = {**json.loads(path.read_text()), **changes}
    del record["checksum"]
    path.write_text(json.dumps({**record, "checksum": content_hash(record)}))
    with pytest.raises(UserError):
        Plan.load(tmp_path)


def test_a_plan_whose_record_lists_no_files_is_refused(tmp_path: Path) -> None:
    path = plan().save(tmp_path) / "plan.json"
    record = json.loads(path.read_text())
    del record["checksum"], record["files"]
    path.write_text(json.dumps({**record, "checksum": content_hash(record)}))
    with pytest.raises(UserError):
        Plan.load(tmp_path)


def test_provenance_by_step_survives(tmp_path: Path) -> None:
    folder = replace(plan(), provenance={"cost": {2: 0.5, 10: 0.25}}).save(tmp_path)
    assert Plan.load(folder).provenance["cost"] == {"2": 0.5, "10": 0.25}


def test_the_summary_names_what_matters() -> None:
    text = plan().summary()
    for expected in ("UNet2DModel", "5 evaluations", "[0, 3]", "W8A8 on 2 layers", "forecast", "1.25", "1.5"):
        assert expected in text
    assert "none" in plan(quantised=False).summary()
    long = replace(plan(), schedule=Schedule(tuple(range(40)), 50, 1))
    assert "…" in long.summary() and "39" not in long.summary().splitlines()[2]
