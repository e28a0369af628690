"""The autotune: fastest kernel, failures left out, table on disk."""

from __future__ import annotations

import json

import pytest
import torch

from cachequant.kernels.cuda.tuning import REFERENCE, TuningTable

COST = {"slow": 3.0, "fast": 1.0, "middle": 2.0}


@pytest.fixture
def made(tmp_path):
    """A table that measures by looking the last called kernel up."""
    called: list[str] = []

    def measure(call):
        call()
        return COST[called[-1]]

    return TuningTable(tmp_path / "kernels" / "table.json", measure), called


def test_the_fastest_is_chosen_kept_and_not_measured_again(made):
    table, called = made
    assert table.best("shape", list(COST), called.append) == "fast"
    assert called == list(COST)
    assert table.best("shape", list(COST), called.append) == "fast"
    assert len(called) == 3
    again = TuningTable(table.path, table.measure)
    again.read()
    assert again.best("shape", list(COST), called.append) == "fast"
    assert len(called) == 3


def test_a_choice_that_is_no_longer_offered_is_measured_again(made):
    table, called = made
    table.chosen["shape"] = "gone"
    assert table.best("shape", ["slow", "middle"], called.append) == "middle"


def test_what_another_process_filed_meanwhile_stays(made):
    table, called = made
    other = TuningTable(table.path, table.measure)
    other.best("theirs", ["middle"], called.append)
    other.best("both", ["middle"], called.append)
    table.best("ours", list(COST), called.append)
    table.chosen["both"] = "fast"  # measured by both
    table.write()
    assert json.loads(table.path.read_text()) == {"ours": "fast", "theirs": "middle", "both": "fast"}


def test_kernels_without_memory_or_support_are_left_out_with_the_reason(made):
    table, called = made

    def call(name: str) -> None:
        if name == "fast":
            raise torch.OutOfMemoryError("no memory for the workspace")
        if name == "middle":
            raise RuntimeError("CUTLASS status 7")
        called.append(name)

    assert table.best("shape", list(COST), call) == "slow"
    assert "no memory" in table.failures["fast shape"]
    assert not table.path.exists() or "shape" not in json.loads(table.path.read_text())  # memory may be there next time
    assert table.best("shape", list(COST), called.append) == "slow"
    other = TuningTable(table.path, table.measure)  # another process has the memory
    assert other.best("shape", list(COST), called.append) == "fast"
    table.best("next", list(COST), called.append)
    assert json.loads(table.path.read_text()) == {"next": "fast", "shape": "fast"}


def test_where_every_kernel_fails_plain_torch_takes_over_and_is_not_filed(made):
    table, called = made

    def call(name: str) -> str:
        if name != REFERENCE:
            raise RuntimeError("CUTLASS status 7")
        called.append(name)
        return "slow but right"

    assert table.run("shape", ["fast", "middle"], call) == "slow but right"
    assert called == [REFERENCE] and table.unserved == ["shape"]
    assert table.failures == {
        "fast shape": "fast: CUTLASS status 7",
        "middle shape": "middle: CUTLASS status 7",
    }
    assert table.run("shape", ["fast", "middle"], call, may_measure=False) == "slow but right"  # in a capture, too
    table.best("next", list(COST), called.append)
    assert json.loads(table.path.read_text()) == {"next": "fast"}
    other = TuningTable(table.path, table.measure)  # another process tries the kernels again
    assert other.best("shape", list(COST), called.append) == "fast"


def test_a_kernel_on_file_that_fails_now_gives_way_to_the_next(made):
    table, called = made
    table.chosen["shape"] = "fast"

    def call(name: str) -> str:
        called.append(name)
        if name == "fast":
            raise torch.OutOfMemoryError("no memory for the workspace")
        return name

    assert table.run("shape", list(COST), call) == "middle"
    assert called == ["fast", "slow", "middle", "middle"]  # the other two are measured
    assert table.failures == {"fast shape": "fast: no memory for the workspace"}
    assert table.chosen["shape"] == "fast" and table.provisional == {"shape": "middle"} and not table.unserved


def test_a_failure_of_plain_torch_carries_the_kernels_reasons(made):
    table, _ = made

    def call(name: str) -> None:
        raise torch.OutOfMemoryError("full") if name == REFERENCE else RuntimeError("CUTLASS status 7")

    with pytest.raises(torch.OutOfMemoryError, match="full") as raised:
        table.run("shape", ["fast"], call)
    assert raised.value.__notes__ == ["shape: fast: CUTLASS status 7"]


def test_a_failure_during_a_capture_is_raised_and_leaves_nothing_out(made):
    table, _ = made

    def call(name: str) -> None:
        raise RuntimeError("CUTLASS status 7")

    with pytest.raises(RuntimeError, match="CUTLASS status 7") as raised:
        table.run("shape", ["fast"], call, may_measure=False)
    assert raised.value.__notes__ == ["shape: fast failed during a capture"] and not table.failures


def test_nothing_is_measured_or_filed_during_capture(made):
    table, called = made
    assert table.best("shape", ["slow", "fast"], called.append, may_measure=False) == "slow"
    assert called == [] and not table.path.exists()


@pytest.mark.parametrize("content", ["", '{"shape": "fa', "[1]"])
def test_a_damaged_table_counts_as_none(made, content):
    table, called = made
    table.path.parent.mkdir()
    table.path.write_text(content)
    table.read()
    assert table.best("shape", list(COST), called.append) == "fast"
    assert json.loads(table.path.read_text()) == {"shape": "fast"}
