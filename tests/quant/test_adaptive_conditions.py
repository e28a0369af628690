"""Joint conditions of a DiT's blocks against diffusers' own adaptive norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.models.adapter import adapter
from cachequant.quant.adaptive_conditions import AdaptiveConditions, share_adaptive_conditions
from cachequant.quant.convert import LayerPlan, fresh_state, install
from cachequant.quant.deploy import deploy_on_device
from cachequant.quant.layers import Mode
from cachequant.quant.step_tables import StepTables
from cachequant.types import QuantState, Schedule

SCHEDULE, TIMESTEPS, CPU = Schedule((0, 2), 4, 2), (900, 600, 300, 0), torch.device("cpu")


def of_blocks(blocks: list[Any], timesteps: tuple[int, ...] | None = None) -> tuple[AdaptiveConditions, FeatureCache]:
    """Joint conditions of plain blocks, and the clock that they read."""
    clock, tables = FeatureCache(SCHEDULE), StepTables(4, CPU)
    tables.freeze(timesteps)
    return AdaptiveConditions.of_blocks(blocks, clock, tables, timesteps), clock


@pytest.fixture
def transformer():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=4, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=8,
    ).eval()  # fmt: skip
    for block in network.transformer_blocks:
        nn.init.normal_(block.norm1.linear.weight, std=0.2)
        block.ff.net[0].proj.time = None
    return network


@torch.no_grad()
def test_each_block_gets_its_own_condition(transformer):
    blocks = list(transformer.transformer_blocks)
    asked = [(torch.tensor([7.0, 500.0]), torch.tensor([3, 10])), (torch.tensor([999.0]), torch.tensor([0]))]
    expected = [
        [b.norm1.linear(b.norm1.silu(b.norm1.emb(t, y, hidden_dtype=torch.float32))).chunk(6, dim=1) for b in blocks]
        for t, y in asked
    ]
    shared, _ = of_blocks(blocks)
    for (timestep, labels), wanted in zip(asked, expected, strict=True):
        for block, parts in zip(blocks, wanted, strict=True):
            found = shared.of(block, timestep, labels, torch.float32)
            assert torch.allclose(found, torch.stack(parts), atol=1e-5)


@torch.no_grad()
def test_a_forward_reads_the_values_of_its_own_timestep(transformer):
    """A captured step finds it at the same address with other values."""
    blocks = list(transformer.transformer_blocks)
    (shared, _), timestep, labels = of_blocks(blocks), torch.zeros(2), torch.tensor([3, 10])
    for value in (999.0, 500.0):
        timestep.fill_(value)
        for block in blocks:
            norm = block.norm1
            expected = norm.linear(norm.silu(norm.emb(timestep, labels, hidden_dtype=torch.float32))).unflatten(
                1, (6, -1)
            )
            found = shared.of(block, timestep, labels, torch.float32)
            assert torch.allclose(found, expected.transpose(0, 1), atol=1e-5)


@torch.no_grad()
def test_memory_is_shared_until_it_is_released(transformer):
    before = {name: p.clone() for name, p in transformer.named_parameters()}
    parts = ("linear", "emb.class_embedder.embedding_table")
    names = [f"transformer_blocks.{i}.norm1.{part}.weight" for i in range(4) for part in parts]
    shared, _ = of_blocks(list(transformer.transformer_blocks))

    def storages() -> int:
        parameters = dict(transformer.named_parameters())
        return len({parameters[name].untyped_storage().data_ptr() for name in names})

    assert storages() == 2
    shared.release()
    assert storages() == len(names)
    assert all(torch.equal(p, before[name]) for name, p in transformer.named_parameters())


def share(network: Any, shallow: set[str] = frozenset()) -> list[AdaptiveConditions]:
    tables = StepTables(4, CPU)
    tables.freeze()
    return share_adaptive_conditions(network, FeatureCache(SCHEDULE), tables, shallow)


def test_groups_follow_what_a_cached_step_runs(transformer):
    made = share(transformer, {"transformer_blocks.0", "transformer_blocks.3"})
    assert [sorted(group.place.values()) for group in made] == [[0, 1], [0, 1]]
    first, second, third, last = (block.ff.net[0].proj.time for block in transformer.transformer_blocks)
    assert first is last and second is third and first is not second


def test_blocks_in_training_are_left_alone(transformer):
    assert share(transformer.train()) == []


@torch.no_grad()
def test_a_table_of_timesteps_gives_what_the_embedders_give(transformer):
    blocks = list(transformer.transformer_blocks)
    shared, clock = of_blocks(blocks, TIMESTEPS)
    labels = torch.tensor([3, 10])
    for clock.step, timestep in reversed(list(enumerate(TIMESTEPS))):
        for block in blocks:
            norm, now = block.norm1, torch.tensor([timestep, timestep])
            expected = norm.linear(norm.silu(norm.emb(now, labels, hidden_dtype=torch.float32))).unflatten(1, (6, -1))
            found = shared.of(block, torch.tensor([-1]), labels, torch.float32)
            assert torch.allclose(found, expected.transpose(0, 1), atol=1e-5)


@torch.no_grad()
def quantised(network: Any) -> QuantState:
    """Integers of all layers, on another grid at every step."""
    clock = FeatureCache(SCHEDULE)
    names = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handle = install(
        network, fresh_state(network, {n: LayerPlan(8, 8, 0) for n in names}, "minmax"), clock, search="minmax"
    )
    handle.set_mode(Mode.OBSERVE)
    for clock.step, timestep in enumerate(TIMESTEPS):
        network(sample(clock.step), torch.tensor([timestep] * 2), torch.tensor([1, 10]))
        handle.finish_step(clock.step)
    state = handle.state
    handle.remove()
    return state


def sample(step: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(step)) * (step + 1)


@torch.no_grad()
def test_deployed_conditions_are_those_of_the_blocks_own_integers(transformer):
    """Embedding and modulation in integers: joint ones against each block on its own, at every step."""
    clock, state = FeatureCache(SCHEDULE), quantised(transformer)
    labels, found = torch.tensor([4, 10]), []
    for timesteps in (TIMESTEPS, None):
        made = deploy_on_device(transformer, state, clock, device=CPU, timesteps=timesteps)
        adapter(transformer).rebuild()
        carriers = [block.ff.net[0].proj.time for block in transformer.transformer_blocks]
        assert all((carrier is not None) is (timesteps is not None) for carrier in carriers)
        steps = enumerate(TIMESTEPS)
        found.append([transformer(sample(clock.step), torch.tensor([t] * 2), labels).sample for clock.step, t in steps])
        made.remove()
    for joint, alone in zip(*found, strict=True):
        assert torch.allclose(joint, alone, atol=1e-5 * float(alone.abs().max()))
