"""Held keys and values of cross-attention against those computed anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cachequant.quant.context import ContextOperands, Fill


class Attention(nn.Module):
    """What is read of a cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k, self.to_v = nn.Linear(6, 4), nn.Linear(6, 4)


def project(module: Any, context: Tensor) -> list[Tensor]:
    return [context @ layer.weight.T.to(context.dtype) for layer in (module.to_k, module.to_v)]


def record(body: Fill) -> Fill:
    """Replays by running the function again, into the first results' memory, as a graph does."""
    with torch.inference_mode(False):
        made = tuple(t.clone() for t in body())

    def replay() -> tuple[Tensor, ...]:
        for old, new in zip(made, body(), strict=True):
            old.copy_(new)
        return made

    return replay


@pytest.fixture
def modules() -> list[Attention]:
    torch.manual_seed(0)
    return [Attention().requires_grad_(False) for _ in range(2)]


def assert_held(operands: ContextOperands, context: Tensor) -> None:
    with operands.reading():
        for module in operands.attentions:
            found, expected = operands.held(module, context), project(module, context)
            assert found is not None
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("first", [True, False])
def test_what_inference_mode_made_is_written_outside_of_it_and_the_other_way_round(
    modules: list[Attention], first: bool
) -> None:
    operands = ContextOperands(modules, project)
    for mode in (first, not first, first):
        with torch.inference_mode(mode):
            context = torch.randn(2, 3, 6)
            operands.update(context, record)
            assert_held(operands, context)


def test_a_failure_on_the_way_leaves_nothing_that_counts_as_made(modules: list[Attention]) -> None:
    broken = False

    def sometimes(module: Any, context: Tensor) -> list[Tensor]:
        if broken and module is modules[1]:
            raise RuntimeError("out of memory")
        return project(module, context)

    operands, context, other = ContextOperands(modules, sometimes), torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    operands.update(context, record)
    broken = True
    with pytest.raises(RuntimeError, match="out of memory"):
        operands.update(other, record)
    broken = False
    operands.update(context, record)  # the first module holds those of the other context
    assert_held(operands, context)


def test_every_shape_and_type_has_memory_of_its_own_that_stays_where_it_is(modules: list[Attention]) -> None:
    """A graph reads the addresses that it was captured with."""
    operands = ContextOperands(modules, project)
    kinds = [(3, torch.float32), (5, torch.float32), (3, torch.float64)]
    places: dict[Any, set[int]] = {}
    for tokens, dtype in kinds * 2:
        context = torch.randn(2, tokens, 6, dtype=dtype)
        operands.update(context, record)
        assert_held(operands, context)
        with operands.reading():
            key = operands.held(modules[0], context)[0]
            places.setdefault((tokens, dtype), set()).add(key.data_ptr())
            assert operands.held(modules[0], context[:1]) is None
    assert all(len(found) == 1 for found in places.values()) and len(set.union(*places.values())) == len(kinds)


def test_nothing_is_held_outside_of_reading(modules: list[Attention]) -> None:
    operands, context = ContextOperands(modules, project), torch.randn(2, 3, 6)
    with operands.reading():
        assert operands.held(modules[0], context) is None
    operands.update(context, record)
    assert operands.held(modules[0], context) is None
