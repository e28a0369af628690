"""The view of a transformer without a span of blocks, against a loop over its blocks written out by hand."""

from __future__ import annotations

import bz2
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cachequant.cache.delta_dit import middle_span, outer_module_names
from cachequant.errors import UserError
from cachequant.models.adapter import adapter
from cachequant.models.dit import DiTAdapter
from cachequant.types import AffineMap

BLOCKS = 6
SPANS = [(1, 2), (0, 2), (3, 5), (4, 4), (1, 4), (0, 4)]
TIMESTEP = torch.tensor([7, 7])
LABELS = torch.tensor([2, 5])  # 5 is the null class


def tiny_dit(layers: int = BLOCKS, width: int = 16, size: int = 8, classes: int = 5) -> nn.Module:
    """Random weights; adaptive norms are not zero, so every block does something."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=width // 2, in_channels=4, out_channels=8, num_layers=layers,
        sample_size=size, patch_size=2, num_embeds_ada_norm=classes,
    ).eval()  # fmt: skip


@pytest.fixture(autouse=True)
def without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def network() -> Any:
    return tiny_dit()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def by_hand(network: Any, x: Tensor, labels: Tensor, span: tuple[int, int], delta: Tensor | None) -> Any:
    """Output and Δ, block after block; with a given Δ the span's blocks are left out."""
    hidden = network.pos_embed(x)
    for index, block in enumerate(network.transformer_blocks):
        if index == span[0]:
            before = hidden
        if delta is None or not span[0] <= index <= span[1]:
            hidden = block(hidden, timestep=TIMESTEP, class_labels=labels)
        elif index == span[0]:
            hidden = hidden + delta
        if index == span[1]:
            behind = hidden
    emb = network.transformer_blocks[0].norm1.emb(TIMESTEP, labels, hidden_dtype=hidden.dtype)
    shift, scale = network.proj_out_1(F.silu(emb)).chunk(2, dim=1)
    hidden = network.proj_out_2(network.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])
    batch, side = len(x), int(hidden.shape[1] ** 0.5)
    pixels = hidden.view(batch, side, side, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(batch, 8, 2 * side, 2 * side)
    return pixels, behind - before


@pytest.mark.parametrize("span", SPANS)
def test_full_and_cached_steps_are_those_of_the_loop(network: Any, x: Tensor, span: tuple[int, int]) -> None:
    cut = DiTAdapter(network, span)
    output, delta = cut.full(x, TIMESTEP, LABELS)
    expected, expected_delta = by_hand(network, x, LABELS, span, None)
    assert torch.equal(output, network(x, TIMESTEP, LABELS).sample)
    assert torch.equal(output, expected) and torch.equal(delta, expected_delta)
    stale = delta.roll(1, dims=0)
    cached = cut.cached(x, TIMESTEP, LABELS, stale)
    assert torch.equal(cached, by_hand(network, x, LABELS, span, stale)[0])
    assert not torch.allclose(cached, output, atol=1e-3)
    assert torch.allclose(cut.cached(x, TIMESTEP, LABELS, delta), output, atol=1e-5)  # x + (y - x) rounds


def test_the_correction_scales_and_shifts_channels(network: Any, x: Tensor) -> None:
    cut = DiTAdapter(network, (1, 3))
    _, delta = cut.full(x, TIMESTEP, LABELS)
    generator = torch.Generator().manual_seed(2)
    affine = AffineMap(torch.rand(16, generator=generator), torch.randn(16, generator=generator))
    corrected = cut.cached(x, TIMESTEP, LABELS, delta, affine)
    assert torch.equal(corrected, cut.cached(x, TIMESTEP, LABELS, delta * affine.scale + affine.shift))


@pytest.mark.parametrize("span", SPANS)
def test_exactly_the_named_modules_run_on_a_cached_step(network: Any, x: Tensor, span: tuple[int, int]) -> None:
    cut = DiTAdapter(network, span)
    _, delta = cut.full(x, TIMESTEP, LABELS)
    leaves = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)}
    ran: set[str] = set()
    handles = [m.register_forward_hook(lambda *_, n=n: ran.add(n)) for n, m in leaves.items()]
    cut.cached(x, TIMESTEP, LABELS, delta)
    for handle in handles:
        handle.remove()
    assert ran == outer_module_names(network, span) & set(leaves)


def test_what_reads_the_condition_is_named_by_what_it_reads(network: Any, x: Tensor) -> None:
    cut = DiTAdapter(network)
    shapes: dict[str, int] = {}
    leaves = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    handles = [
        m.register_forward_pre_hook(lambda _, inputs, n=n: shapes.update({n: inputs[0].dim()}))
        for n, m in leaves.items()
    ]
    cut.full(x, TIMESTEP, LABELS)
    for handle in handles:
        handle.remove()
    assert cut.time_names() == {n for n, dims in shapes.items() if dims == 2}  # no tokens
    assert cut.end_names() <= {n for n, _ in network.named_modules()} and not cut.splits()


@pytest.mark.parametrize("span", SPANS)
def test_consumers_are_the_first_products_of_what_the_span_left(network: Any, x: Tensor, span: tuple[int, int]) -> None:
    """Of the linear layers on tokens that run behind the span, those before any other's output is mixed in."""
    cut = DiTAdapter(network, span)
    order: list[str] = []
    handles = [
        m.register_forward_pre_hook(lambda _, inputs, n=n: order.append(n) if inputs[0].dim() == 3 else None)
        for n, m in network.named_modules()
        if isinstance(m, nn.Linear)
    ]
    cut.full(x, TIMESTEP, LABELS)
    for handle in handles:
        handle.remove()
    last = max(i for i, n in enumerate(order) if n.startswith(f"transformer_blocks.{span[1]}."))
    names = [c.name for c in cut.consumers()]
    assert order[last + 1 : last + 1 + len(names)] == names
    assert len(names) == (1 if span[1] == BLOCKS - 1 else 3)


def test_a_number_or_one_element_serves_as_timestep(network: Any, x: Tensor) -> None:
    cut = DiTAdapter(network)
    expected, delta = cut.full(x, TIMESTEP, LABELS)
    for timestep in (7, torch.tensor(7), torch.tensor([7])):
        assert torch.equal(cut.full(x, timestep, class_labels=LABELS)[0], expected)
    assert cut.cached(x, 7, LABELS, delta).shape == expected.shape


def test_the_network_is_left_as_it_was(network: Any, x: Tensor) -> None:
    before, expected = [id(m) for m in network.modules()], network(x, TIMESTEP, LABELS).sample
    cut = DiTAdapter(network, (2, 3))
    _, delta = cut.full(x, TIMESTEP, LABELS)
    cut.cached(x, TIMESTEP, LABELS, delta)
    with pytest.raises(RuntimeError):
        cut.full(x[:, :1], TIMESTEP, LABELS)
    with pytest.raises(RuntimeError):
        cut.cached(x[:, :1], TIMESTEP, LABELS, delta)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    with pytest.raises(RuntimeError, match="before a Δ was set"):
        cut._run(cut._view, x, TIMESTEP, LABELS, {})
    assert [id(m) for m in network.modules()] == before
    assert torch.equal(network(x, TIMESTEP, LABELS).sample, expected)


def test_the_middle_half_is_the_papers_span() -> None:
    assert middle_span(28) == (7, 20)
    assert middle_span(6) == (1, 4) and middle_span(2) == (0, 1)


@pytest.mark.parametrize("span", [(-1, 2), (2, 1), (3, 6), (0, 5), (1,), (1, 2, 3)])
def test_a_span_that_does_not_exist_or_leaves_nothing_is_refused(network: Any, span: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=re.escape(f"cache.span is {list(span)}, expected")):
        adapter(network, span=span)


def test_each_kind_of_network_has_its_own_setting(network: Any) -> None:
    from diffusers import UNet2DModel

    with pytest.raises(UserError, match=r"cache.branch is 2 for a DiT.*set cache.span"):
        adapter(network, branch=2)
    unet = UNet2DModel(
        8, 1, 1, block_out_channels=(4,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=2, attention_head_dim=4,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"cache.span is \[1, 2\] for a UNet2DModel.*set cache.branch"):
        adapter(unet, span=[1, 2])


def test_guidance_shows_in_the_labels(network: Any) -> None:
    cut = DiTAdapter(network)
    assert cut.guided({"class_labels": torch.tensor([1, 5])}) is True
    assert cut.guided({"class_labels": torch.tensor([1, 4])}) is False
    assert cut.guided({}) is None


def from_original(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The original repository's weights under diffusers' names; every block has its copy of the embedding."""
    made = {
        "pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }  # fmt: skip
    for i in range(depth):
        new, old = f"transformer_blocks.{i}", f"blocks.{i}"
        made |= {
            f"{new}.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            f"{new}.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            f"{new}.norm1.linear": f"{old}.adaLN_modulation.1", f"{new}.attn1.to_out.0": f"{old}.attn.proj",
            f"{new}.ff.net.0.proj": f"{old}.mlp.fc1", f"{new}.ff.net.2": f"{old}.mlp.fc2",
        }  # fmt: skip
    flat = {f"{new}.{kind}": state[f"{old}.{kind}"] for new, old in made.items() for kind in ("weight", "bias")}
    for i in range(depth):
        new = f"transformer_blocks.{i}"
        flat[f"{new}.norm1.emb.class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
        for kind in ("weight", "bias"):
            parts = state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            flat |= {f"{new}.attn1.to_{p}.{kind}": t for p, t in zip("qkv", parts, strict=True)}
    return flat


def test_full_and_cached_steps_of_the_original_blocks(golden_folder: Path) -> None:
    from diffusers import DiTTransformer2DModel

    folder = golden_folder / "dit_xl2"
    packed = bz2.decompress((folder / "DiT-XL-2-256x256.pt.bz2").read_bytes())
    network = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=28, sample_size=16,
    ).eval()  # fmt: skip
    network.load_state_dict(from_original(torch.load(io.BytesIO(packed), weights_only=True), 28))
    for block in network.transformer_blocks:  # the original's sinusoids; diffusers divides by one frequency fewer
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    case = load_file(folder / "case.safetensors")
    cut = adapter(network)
    output, delta = cut.full(case["x"], case["t"], case["y"])
    cached = cut.cached(case["x2"], case["t2"], case["y"], case["cache_delta"])
    full, _ = cut.full(case["x2"], case["t2"], case["y"])
    for made, name in ((output, "out"), (delta, "cache_delta"), (full, "out2_full"), (cached, "out2_cached")):
        assert (made - case[name]).abs().max() <= 5e-5 * case[name].abs().max(), name
