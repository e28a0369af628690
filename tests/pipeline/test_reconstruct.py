"""Reconstruction of whole networks: which blocks, in which order, resumed, and corrected afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from cachequant.cli import build_parser
from cachequant.config import RunConfig
from cachequant.pipeline import reconstruct as module
from cachequant.pipeline.context import Context
from cachequant.pipeline.reconstruct import find_blocks
from cachequant.pipeline.stages import Stages
from cachequant.types import QuantState

Configure = Callable[..., RunConfig]
RECON = (
    "quant.recon.enabled=true", "quant.recon.iterations=6", "quant.recon.samples=12", "quant.recon.batch_size=4",
    "quant.recon.weight_lr=0.1", "quant.rounding=nearest",
)  # fmt: skip


def stages_of(pipe: Any, config: RunConfig, folder: Path) -> Stages:
    return Stages.at(Context.of(pipe, config), folder, quiet=True)


def equal(a: QuantState, b: QuantState) -> bool:
    return all(
        torch.equal(x.values, y.values) and torch.equal(s.scale, t.scale)
        for name in a.layers
        for x, y, s, t in zip(
            a.layers[name].weights, b.layers[name].weights, a.layers[name].inputs, b.layers[name].inputs, strict=True
        )
    )


def test_blocks_of_a_unet_come_in_forward_order(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    stages = stages_of(pipe, configure("quant.ends_bits=8"), tmp_path)
    state, _ = stages.grids()
    blocks = find_blocks(stages._walk(), list(state.layers))
    names = [block.name for block in blocks]
    places = ["conv_in", "down_blocks.0.resnets.0", "down_blocks.1.attentions.0", "mid_block.resnets.0", "conv_out"]
    assert sorted(places, key=names.index) == places
    assert names[-2] == "up_blocks.1.resnets.1"
    covered = [layer for block in blocks for layer in block.layers]
    assert sorted(covered) == sorted(state.layers) and len(set(covered)) == len(covered)
    by_name = {block.name: block for block in blocks}
    assert "down_blocks.1.attentions.0.to_q" in by_name["down_blocks.1.attentions.0"].layers
    assert by_name["up_blocks.1.resnets.1"].shallow and not by_name["mid_block.resnets.0"].shallow


def test_interrupted_it_goes_on_behind_the_last_block(
    pipe: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, train, calls = configure("quant.weight_bits=4", *RECON), module.train_block, []
    whole, _ = stages_of(pipe, config, tmp_path / "whole").quant()

    def counted(*args: Any) -> tuple[float, float]:
        calls.append(args[-1])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(module, "train_block", counted)
    needed = [p.requires_grad for p in pipe.unet.parameters()]
    with pytest.raises(KeyboardInterrupt):
        stages_of(pipe, config, tmp_path / "parts").quant()
    assert [p.requires_grad for p in pipe.unet.parameters()] == needed
    assert not any(type(m).__name__ in ("QuantLayer", "LearnedLayer") for m in pipe.unet.modules())
    made, _ = stages_of(pipe, config, tmp_path / "parts").quant()
    total = int(calls[0].split("/")[1].split()[0])
    assert len(calls) == total + 1  # the fourth twice
    assert whole is not None and made is not None and equal(whole, made)
    count = len(calls)
    stages_of(pipe, config, tmp_path / "parts").quant()
    assert len(calls) == count


def test_at_eight_bits_only_what_every_step_runs_is_trained(
    pipe: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(module, "train_block", lambda *args: trained.append(args[-1].split()[-1]) or (1.0, 2.0))
    stages = stages_of(pipe, configure(*RECON), tmp_path)
    state, _ = stages.quant()
    blocks = {block.name: block for block in find_blocks(stages._walk(), list(stages.grids()[0].layers))}
    assert trained == [name for name, block in blocks.items() if block.shallow]
    assert state is not None and equal(state, stages.grids()[0])  # what training made worse stays as it was


def test_the_layers_are_corrected_for_what_came_out_of_it(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    options = ("quant.weight_bits=4", "correction.layers=consumers")
    with_it, _ = stages_of(pipe, configure(*options, *RECON), tmp_path).plan()
    without, _ = stages_of(pipe, configure(*options, "quant.rounding=nearest"), tmp_path).plan()
    assert with_it.quant is not None and without.quant is not None
    assert not equal(with_it.quant, without.quant)
    name = next(iter(with_it.correction.layers))
    assert not torch.equal(with_it.correction.layers[name][0].scale, without.correction.layers[name][0].scale)
    again = with_it.load(with_it.save(tmp_path / "plan"))
    assert again.quant is not None and equal(again.quant, with_it.quant)


def test_blocks_of_a_transformer(configure: Configure, tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=8,
        patch_size=2,
    )
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=16)
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    config = configure("quant.weight_bits=4", "sampler.guidance_scale=1.5", *RECON)
    stages = stages_of(pipe, config, tmp_path)
    blocks = find_blocks(stages._walk(), list(stages.grids()[0].layers))
    names = [block.name for block in blocks]
    assert [n for n in names if n.startswith("transformer_blocks")] == [f"transformer_blocks.{i}" for i in range(4)]
    assert [block.shallow for block in blocks if block.name.startswith("transformer_blocks")] == [
        True,
        False,
        False,
        True,
    ]
    state, _ = stages.quant()
    assert state is not None and set(state.layers) == set(stages.grids()[0].layers)


def test_recon_is_a_change_of_the_configuration() -> None:
    args = build_parser().parse_args(["run", "x.yaml", "--set", "cache.interval=5", "--recon"])
    assert args.set == ["cache.interval=5", "quant.recon.enabled=true"]
    assert build_parser().parse_args(["run", "x.yaml"]).set == []
