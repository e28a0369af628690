"""Joint conditions of a DiT's blocks against diffusers' own adaptive norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cachequant.quant.adaptive_conditions import AdaptiveConditions, share_adaptive_conditions


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
    shared = AdaptiveConditions(blocks)
    for (timestep, labels), wanted in zip(asked, expected, strict=True):
        for block, parts in zip(blocks, wanted, strict=True):
            found = shared.of(block, timestep, labels, torch.float32)
            assert torch.allclose(found, torch.stack(parts), atol=1e-5)


@torch.no_grad()
def test_a_forward_reads_the_values_of_its_own_timestep(transformer):
    """A captured step finds it at the same address with other values."""
    blocks = list(transformer.transformer_blocks)
    shared, timestep, labels = AdaptiveConditions(blocks), torch.zeros(2), torch.tensor([3, 10])
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
    shared = AdaptiveConditions(list(transformer.transformer_blocks))

    def storages() -> int:
        parameters = dict(transformer.named_parameters())
        return len({parameters[name].untyped_storage().data_ptr() for name in names})

    assert storages() == 2
    shared.release()
    assert storages() == len(names)
    assert all(torch.equal(p, before[name]) for name, p in transformer.named_parameters())


def test_groups_follow_what_a_cached_step_runs(transformer):
    made = share_adaptive_conditions(transformer, {"transformer_blocks.0", "transformer_blocks.3"})
    assert [sorted(group.place.values()) for group in made] == [[0, 1], [0, 1]]
    first, second, third, last = (block.ff.net[0].proj.time for block in transformer.transformer_blocks)
    assert first is last and second is third and first is not second


def test_blocks_in_training_are_left_alone(transformer):
    assert share_adaptive_conditions(transformer.train()) == []
