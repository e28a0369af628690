"""What computes a product where kernels fail: the next kernel, and plain torch at last. Stand-ins fail as kernels do."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from cachequant.kernels import cuda
from cachequant.kernels.cuda import dispatch, library, plain, reference
from cachequant.kernels.cuda.library import KernelError
from cachequant.kernels.cuda.tuning import TuningTable
from cachequant.kernels.cuda.variants import VARIANTS

COMPILED, TRITON = (VARIANTS[0].name, VARIANTS[1].name), "triton_16x16x32x4x1"


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """The tuning table of a card that is not there; two compiled kernels and one of Triton's are offered, and none runs."""

    def measure(call):
        call()
        return 1.0

    def no_memory(variant, *_):
        raise (
            torch.OutOfMemoryError("no memory for the workspace") if variant is VARIANTS[0] else KernelError("status 7")
        )

    def too_large(*_):
        raise ValueError("out of resource: shared memory")

    def stand_in(name: str, **functions):
        module = SimpleNamespace(Blocks=lambda *sizes: sizes, Operands=lambda *given: given, **functions)
        monkeypatch.setitem(sys.modules, f"cachequant.kernels.cuda.{name}", module)
        monkeypatch.setattr(cuda, name, module, raising=False)

    made = TuningTable(tmp_path / "table.json", measure)
    monkeypatch.setattr(dispatch, "table", lambda device: made)
    monkeypatch.setattr(dispatch, "candidates", lambda *_: (*COMPILED, TRITON))
    monkeypatch.setattr(dispatch, "activated_candidates", lambda *_: (*COMPILED, TRITON))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(library, "run", no_memory)
    stand_in("triton_product", linear=too_large, conv2d=too_large)
    stand_in("triton_feed_forward", activated=too_large)
    return made


def product(dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor]:
    """(found, expected) of a linear layer of more rows than plain torch takes at a time, with a full epilogue."""
    x, weight = integers(plain.ROWS + 5, 16), integers(8, 16)
    rows, scale, shift, offset = len(x), torch.rand(8) * 1e-3, torch.randn(8), torch.randn(8) * 1e-3
    source, sums = torch.randn(rows, 8).half(), torch.randint(-999, 999, (rows,)).float()
    out = torch.empty(rows, 8, dtype=dtype)
    dispatch.run_product(x, weight, (1, 1), scale, shift, source, 0.5, sums, offset, out)
    total = reference.accumulate_linear(x, weight)
    return out, reference.epilogue(total, scale, shift, source, 0.5, sums, offset, dtype)


def test_triton_takes_over_where_no_compiled_kernel_runs(table, monkeypatch):
    def linear(x, weight, operands, out, blocks):
        out.copy_(reference.epilogue(reference.accumulate_linear(x, weight), *operands, out.dtype))

    monkeypatch.setattr(cuda.triton_product, "linear", linear)
    found, expected = product()
    assert torch.equal(found, expected)
    assert set(table.provisional.values()) == {TRITON} and not table.unserved
    assert sorted(table.failures.values()) == sorted(
        [f"{COMPILED[0]}: no memory for the workspace", f"{COMPILED[1]}: status 7"]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8])
def test_plain_torch_multiplies_where_no_kernel_runs(table, dtype):
    found, expected = product(dtype)
    assert torch.equal(found, expected)
    (key,) = table.unserved
    assert key.startswith(f"linear {plain.ROWS + 5}x16x8x16") and len(table.failures) == 3
    assert any("out of resource" in reason for reason in table.failures.values())


def test_plain_torch_convolves_where_no_kernel_runs(table):
    x, weight, stride = integers(3, 6, 5, 16), integers(8, 3, 3, 16), (2, 1)
    total = reference.accumulate_conv2d(x, weight, stride)
    scale, sums = torch.rand(8), reference.window_sum(x, (3, 3), stride)
    given = scale, None, torch.randn(total.shape), 2.0, sums, torch.randn(8)
    out = torch.empty(total.shape)
    dispatch.run_product(x, weight, stride, *given, out)
    assert torch.equal(out, reference.epilogue(total, *given, torch.float32))
    assert len(table.unserved) == 1


@pytest.mark.parametrize("kind", ["geglu", "gelu", "gelu_tanh"])
def test_plain_torch_activates_where_no_kernel_runs(table, kind):
    x, weight = integers(plain.ROWS + 5, 16), integers(16, 16)
    given = torch.rand(16) * 1e-3, torch.randn(16), torch.randn(len(x)), torch.randn(16) * 1e-2
    grid = torch.tensor([20.0, 5.0, -128.0, 127.0])
    out = torch.empty(len(x), 8 if kind == "geglu" else 16, dtype=torch.int8)
    dispatch.run_activated(x, weight, *given, grid, kind, out)
    assert torch.equal(out, reference.activated(x, weight, *given, grid, kind))
    assert len(table.unserved) == 1


def test_attention_falls_back_to_torchs_own_choice(table, monkeypatch):
    """Implementations that fail when they are measured; torch's own choice, which is one of them, runs unmeasured."""

    def fails(call):
        raise torch.OutOfMemoryError("no memory for the capture")

    table.measure = fails
    q, k, v = torch.randn(3, 2, 5, 8)
    assert torch.equal(dispatch.run_attention(q, k, v, 2), reference.multi_head_attention(q, k, v, 2))
    assert len(table.unserved) == 1 and len(table.failures) == 1 + len(dispatch.ATTENTION_BACKENDS)
