"""The tables of what changes from step to step, through the operator's reference on the CPU."""

import torch

from cachequant.quant.step_tables import StepTables
from cachequant.types import ActivationTable, AffineMap


def test_tables_hold_a_map_for_every_step_that_has_one() -> None:
    """Three products of three steps: one with two maps, one with one, one without."""
    tables = StepTables(3, torch.device("cpu"))
    grid = tables.add_grids((ActivationTable(torch.arange(3).int(), torch.ones(3), torch.full((3,), 128.0), 8),))
    torch.manual_seed(0)
    maps = [AffineMap(torch.rand(5), torch.randn(5)) for _ in range(3)]
    corrections = [{0: maps[0], 2: maps[1]}, {1: maps[2]}, {}]
    scale, sums = torch.rand(5), torch.zeros(5)
    columns = [tables.add_columns(grid, scale, None, sums, None, given) for given in corrections]
    tables.freeze()
    assert tables._maps[-1].numel() == 3 * 5
    for step in range(3):
        tables.ensure(step)
        for place, given in zip(columns, corrections, strict=True):
            expected = given.get(step, AffineMap.identity(5))
            found, shift, _ = tables.of(place)
            torch.testing.assert_close(found, scale * expected.scale)
            torch.testing.assert_close(shift, expected.shift)
