"""The captured accelerated step against the plain one, with a recorder that runs the body again at fixed addresses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.models.adapter import adapter
from cachequant.pipeline.graphed_step import MapTable, graphed_step
from cachequant.pipeline.graphs import Inputs
from cachequant.pipeline.hook import Call
from cachequant.pipeline.step import accelerated_step
from cachequant.quant.step_tables import StepTables
from cachequant.types import AffineMap, Correction, Schedule

STEPS, SCHEDULE = 7, Schedule((0, 3, 5), 7, 2)
CPU = torch.device("cpu")


class Recorder:
    """Replays by running the body; the results stay where they are, as those of a graph do."""

    def __call__(self, body):
        made = body()

        def replay():
            for old, new in zip(made, body(), strict=True):
                old.copy_(new)
            return made

        return replay


def unet(outputs: int = 3):
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, out_channels=outputs, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def dit():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=6,
        num_layers=4,
        sample_size=8,
        patch_size=2,
    ).eval()


def affine(channels: int, forecast: bool) -> AffineMap:
    previous = 0.1 * torch.randn(channels) if forecast else None
    return AffineMap(1 + 0.1 * torch.randn(channels), 0.1 * torch.randn(channels), previous)


def walk(step, cache: FeatureCache, call, contexts: tuple[str, ...] = ("one",)) -> list[Tensor]:
    """A run; features of different contexts never meet."""
    cache.reset()
    outputs = []
    with torch.no_grad():
        for number in range(STEPS):
            refresh = False
            for context in contexts:
                cache.context = context
                refresh = cache.must_refresh
                outputs.append(step(call(number, context)))
            cache.advance(refresh)
    return outputs


@pytest.mark.parametrize("network", [unet(), unet(6), dit()], ids=["unet", "learned variance", "dit"])
@pytest.mark.parametrize("forecast", [False, True])
@pytest.mark.parametrize("contexts", [("one",), ("with", "without")])
def test_the_captured_step_is_the_plain_one(network, forecast: bool, contexts: tuple[str, ...]) -> None:
    structure = adapter(network)
    maps = {step: affine(structure.width, forecast) for step in (1, 2, 4)}  # none for step 6
    correction = Correction(maps, {}, {step: affine(3, True) for step in (0, 2, 3)})
    labels = {"class_labels": torch.tensor([3, 5])} if hasattr(network, "transformer_blocks") else {}

    def call(number: int, context: str) -> Call:
        generator = torch.Generator().manual_seed(10 * number + len(context))
        return Call(torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([100 * number] * 2), labels)

    def cache() -> FeatureCache:
        return FeatureCache(SCHEDULE, 2 if forecast else 1, structure.channel_dim)

    plain, ours = cache(), cache()
    tables = StepTables(STEPS, CPU)
    tables.freeze()
    expected = walk(accelerated_step(structure, plain, correction), plain, call, contexts)
    step = graphed_step(structure, ours, correction, tables, Recorder())
    for _ in range(2):
        found = walk(step, ours, call, contexts)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_inputs_are_copied_when_they_are_others_or_were_written_to() -> None:
    first, other = torch.ones(3), torch.full((3,), 2.0)
    inputs = Inputs({"x": first}, CPU)
    for tensor in (first, other):
        inputs.load({"x": tensor}, anew=False)
        assert torch.equal(inputs.fixed["x"], tensor)
    other.mul_(3)
    inputs.load({"x": other}, anew=False)
    assert torch.equal(inputs.fixed["x"], torch.full((3,), 6.0))
    inputs.fixed["x"].zero_()  # what stays in place is seen by its absence
    inputs.load({"x": other}, anew=False)
    assert not inputs.fixed["x"].any()
    inputs.load({"x": other}, anew=True)
    assert torch.equal(inputs.fixed["x"], other)
    with torch.inference_mode():
        uncounted = torch.ones(3)
        inputs.load({"x": uncounted}, anew=False)
        uncounted.mul_(5)
        inputs.load({"x": uncounted}, anew=False)
        assert torch.equal(inputs.fixed["x"], torch.full((3,), 5.0))


def test_steps_without_a_map_change_nothing() -> None:
    given = affine(4, True)
    table = MapTable.of({2: given}, 5, CPU)
    assert table is not None and MapTable.of({}, 5, CPU) is None
    x, other = torch.randn(2, 4, 3, 5), torch.randn(2, 6, 3, 5)
    for step in range(5):
        found = table.apply(x, other, torch.tensor([step]), 1)
        wanted = given.apply(x, other[:, :4]) if step == 2 else x
        assert torch.equal(found, wanted)


def test_maps_of_two_tensors_need_the_second() -> None:
    table = MapTable.of({0: affine(4, True)}, 5, CPU)
    assert table is not None
    with pytest.raises(ValueError, match="second"):
        table.apply(torch.randn(2, 4, 3, 5), None, torch.tensor([0]), 1)
