"""Every operator in torch's namespace `cachequant` as torch.compile and torch.export see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from cachequant.kernels.cuda import ops, step_ops  # noqa: F401
from cachequant.kernels.native import load_native
from tests.kernels.operator_cases import device_cases, native_cases

CASES = device_cases() | (native_cases() if load_native() is None else {})


def operator(case: str) -> Any:
    """The overload that a case is of."""
    return getattr(torch.ops.cachequant, case.partition(":")[0]).default


def test_every_registered_operator_has_a_case() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("cachequant::")}
    assert registered == {operator(case).name() for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_schema_and_fake_agree_with_the_operator(case: str) -> None:
    """Mutation and aliasing as declared; shapes, types and strides as the operator returns them, of symbolic sizes too."""
    found = opcheck(operator(case), CASES[case])
    assert set(found) >= {"test_schema", "test_faketensor", "test_aot_dispatch_dynamic"}
    assert set(found.values()) == {"SUCCESS"}


class Call(nn.Module):
    """One operator on the tensors of a case, which are the module's inputs; the other arguments are fixed.

    An operator that writes to its operands returns copies of those.
    """

    def __init__(self, case: str) -> None:
        super().__init__()
        self.operator = operator(case)
        leaves, self.structure = tree_flatten(CASES[case])
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        made = self.operator(*tree_unflatten(leaves, self.structure))
        if made is None:
            return [tensor.clone() for tensor in tensors]
        return [made] if isinstance(made, Tensor) else list(made)


def tensors_of(case: str) -> list[Tensor]:
    """Fresh inputs in the same memory order."""
    return [tree_map(torch.Tensor.clone, leaf) for leaf in tree_flatten(CASES[case])[0] if isinstance(leaf, Tensor)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit, and the same in memory."""
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is other.dtype and one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
def test_a_module_that_calls_it_is_exported(case: str) -> None:
    module = Call(case)
    program = torch.export.export(module, tuple(tensors_of(case)))
    assert operator(case) in {node.target for node in program.graph.nodes} or "auto_functionalized" in str(
        program.graph
    )
    assert_same(program.module()(*tensors_of(case)), module(*tensors_of(case)))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_module_that_calls_it_is_compiled_in_one_graph(case: str, dynamic: bool) -> None:
    torch.compiler.reset()
    module = Call(case)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert_same(compiled(*tensors_of(case)), module(*tensors_of(case)))
