"""The checks that a person runs on a GPU, here with their smallest shapes on the CPU, in Triton's interpreter."""

from __future__ import annotations

import importlib
import json
import os
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

if not os.environ.get("CACHEQUANT_TEST_KERNELS"):  # make test-kernels brings it
    pytest.importorskip("triton", reason="Triton is not installed (it comes with CUDA builds of torch)")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=0: these tests need the interpreter", allow_module_level=True)

from cachequant.config import repository_folder
from tests.kernels.cuda.interpreted import gpu_operators

Scripts = tuple[ModuleType, Any]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Scripts:
    """(check_kernels, norm_cases) whose operators are the GPU's, run by the interpreter."""
    monkeypatch.syspath_prepend(repository_folder() / "scripts" / "gpu")
    checks, norms = (importlib.import_module(name) for name in ("check_kernels", "norm_cases"))
    operators = gpu_operators(monkeypatch)
    for module, name in ((checks, "ops"), (checks, "step_ops"), (norms, "ops")):
        monkeypatch.setattr(module, name, operators)
    monkeypatch.setattr(checks, "CARD", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "interpreter")
    torch.manual_seed(0)
    return checks, norms


@pytest.mark.slow
@pytest.mark.parametrize("part", ["norms", "pointwise", "triton", "feed-forward"])
def test_quick_checks_pass_in_the_interpreter(scripts: Scripts, part, tmp_path, monkeypatch, capsys):
    checks, _ = scripts
    made = tmp_path / "cases.json"
    monkeypatch.setattr("sys.argv", ["check_kernels.py", "--quick", "--part", part, "--json", str(made)])
    status = checks.main()
    failed = [case for case in json.loads(made.read_text()) if not case["ok"]]
    assert status == 0 and not failed, failed
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.slow
def test_random_group_norms_pass_in_the_interpreter(scripts: Scripts):
    _, norms = scripts
    drawn = list(norms.random_group_norms(norms.RANDOM_CASES, 4))
    kinds = {(len(widths), *flags) for _, widths, _, _, *flags, _ in drawn}
    assert len(kinds) > 10 and all(sum(widths) % groups == 0 for _, widths, groups, *_ in drawn)
    failed = [case for arguments in drawn if not (case := norms.group_norm_case(*arguments)).ok]
    assert not failed


def test_a_kernel_that_leaves_memory_out_fails_its_case(scripts: Scripts, monkeypatch):
    checks, norms = scripts
    idle = SimpleNamespace(layer_norm_int8=lambda x, *_: torch.empty(1, *x.shape, dtype=torch.int8))
    monkeypatch.setattr(norms, "ops", idle)
    given = (2, 3), 5, False, False, 1, torch.float16
    assert not checks.attempt("layer_norm_int8", "nothing written", norms.layer_norm_case, *given).ok
