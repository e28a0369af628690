"""Stage 4, with `--recon`: blocks reconstructed in forward order (CacheQuant section 4.1, after BRECQ).

A block's inputs are those of the quantised network, whose earlier blocks are done, on the calibration inputs of every step
that it runs on; its targets are its outputs in full precision on the same inputs of the network. Attention operands stay
unrounded while a block trains. Stage 5 fits on what comes out of it, so the correction of quantisation is not lost
(the released code drops it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.pipeline.train_block import BlockData, output_of, train_block
from cachequant.pipeline.walk import Walk
from cachequant.quant.convert import QuantizedNetwork, install, replace_module
from cachequant.quant.layers import Mode
from cachequant.quant.learned import LearnedLayer, Rows
from cachequant.storage import load_tensors, make_folder, pack_quant, save_json, save_tensors, unpack_quant
from cachequant.types import LayerQuant, QuantState

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention")
"""Classes that are reconstructed as a whole, the outermost of nested ones; every other layer is a block of its own.

`BasicTransformerBlock` is the block of diffusers' U-Nets and of its DiT.
"""


@dataclass(frozen=True)
class Block:
    """What is reconstructed together. `shallow`: it runs on every step."""

    name: str
    layers: tuple[str, ...]
    shallow: bool


def find_blocks(walk: Walk, names: list[str]) -> list[Block]:
    """The blocks of the named layers in the order in which the network calls them first."""
    network, shallow = walk.context.adapter.denoiser, walk.context.adapter.shallow_names()
    modules = dict(network.named_modules())
    roots = [n for n, m in modules.items() if type(m).__name__ in BLOCKS]
    # of nested roots the outermost comes first
    owner = {name: next((root for root in roots if name.startswith(f"{root}.")), name) for name in names}
    order = _call_order(walk, list(dict.fromkeys(owner.values())))
    return [
        Block(block, members, members[0] in shallow)
        for block in order
        for members in [tuple(n for n in names if owner[n] == block)]
    ]


def reconstruct(walk: Walk, state: QuantState, folder: Path) -> QuantState:
    """The state with reconstructed weights and activation tables.

    At 8 bits only blocks that run on every step are trained, below all of them, as in the paper. Each block that is
    done is a file in `folder`, with its errors in another; a second call goes on behind the last one.
    """
    network, cache, layers = walk.context.adapter.denoiser, walk.fresh_cache(), dict(state.layers)
    make_folder(folder)
    blocks = [b for b in find_blocks(walk, list(state.layers)) if b.shallow or _bits(b, layers) < 8]
    with _frozen(network):
        for index, block in enumerate(blocks):
            path, label = folder / f"block-{index:03d}.safetensors", f"4 recon {index + 1}/{len(blocks)} {block.name}"
            if not path.is_file():
                made, errors = _one(walk, QuantState(layers, state.operands), cache, block, label)
                save_json(path.with_suffix(".json"), {"block": block.name, "before": errors[0], "after": errors[1]})
                save_tensors(path, pack_quant(QuantState(made)))
            layers |= unpack_quant(load_tensors(path)).layers
    return QuantState(layers, state.operands)


def _one(
    walk: Walk, state: QuantState, cache: FeatureCache, block: Block, label: str
) -> tuple[dict[str, LayerQuant], tuple[float, float]]:
    """Train one block behind the ones before it: its layers, as they were if that is better, and its errors."""
    settings, adapter = walk.context.config.quant.recon, walk.context.adapter
    handle = install(adapter.denoiser, state, cache)
    adapter.rebuild()
    learned: dict[str, LearnedLayer] = {}
    try:
        data, rows = _gather(walk, handle, cache, block, label), Rows()
        handle.set_mode(Mode.FLOAT)  # attention operands
        for name in block.layers:
            learned[name] = LearnedLayer(handle.layers[name].source, state.layers[name], rows, settings.drop)
            replace_module(adapter.denoiser, name, learned[name])
        errors = train_block(adapter.denoiser.get_submodule(block.name), learned, data, rows, settings, label)
        if errors[1] >= errors[0]:
            return {name: state.layers[name] for name in block.layers}, errors
        return {name: layer.hardened() for name, layer in learned.items()}, errors
    finally:
        handle.remove()
        adapter.rebuild()


@torch.no_grad()
def _gather(walk: Walk, handle: QuantizedNetwork, cache: FeatureCache, block: Block, label: str) -> BlockData:
    """Inputs in the quantised network and outputs in full precision, of the steps that the block runs on."""
    steps = range(walk.schedule.num_steps) if block.shallow else walk.schedule.refresh_steps
    limit = -(-walk.context.config.quant.recon.samples // len(steps))
    module, calls, targets = walk.context.adapter.denoiser.get_submodule(block.name), list[_Seen](), list[Tensor]()

    def keep_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        count = len(output_of(output))
        held = {name: _per_row(value, count) for name, value in kwargs.items()}
        calls.append(_Seen(tuple(_per_row(value, count) for value in args), held, cache.step, count))

    def keep_output(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        targets.append(output_of(output).cpu())

    for mode, hook in ((Mode.FLOAT, keep_output), (Mode.QUANTIZED, keep_input)):
        handle.set_mode(mode)
        watching = module.register_forward_hook(hook, with_kwargs=True)
        cache.clear()
        try:
            for _ in walk.run(cache, label, steps, limit):
                pass
        finally:
            watching.remove()
    args = tuple(_joined([call.args[i] for call in calls]) for i in range(len(calls[0].args)))
    kwargs = {name: _joined([call.kwargs[name] for call in calls]) for name in calls[0].kwargs}
    of_rows = torch.cat([torch.full((call.count,), call.step) for call in calls])
    return BlockData(args, kwargs, torch.cat(targets), of_rows)


@dataclass(frozen=True)
class _Seen:
    """One call of a block, its tensors with `count` rows each."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    step: int
    count: int


def _per_row(value: Any, count: int) -> Any:
    """A tensor with a row per sample on the CPU: one for all of them (a timestep) is repeated; others stay as they are."""
    if not isinstance(value, Tensor):
        return value
    if not value.dim() or len(value) != count:
        value = value.reshape(1, *value.shape[1:]).expand(count, *value.shape[1:])
    return value.detach().cpu()


def _joined(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else values[0]


def _call_order(walk: Walk, names: list[str]) -> list[str]:
    """The named modules in the order in which a full step calls them first."""
    seen: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.setdefault(name)

    modules = [(name, walk.context.adapter.denoiser.get_submodule(name)) for name in names]
    handles = [module.register_forward_pre_hook(note(name)) for name, module in modules]
    try:
        with torch.no_grad():
            walk.evaluate(walk.call(0, 1), walk.fresh_cache())
    finally:
        for handle in handles:
            handle.remove()
    return list(seen)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Inside, no parameter of the network has a gradient."""
    before = [(p, p.requires_grad) for p in network.parameters()]
    network.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)


def _bits(block: Block, layers: dict[str, LayerQuant]) -> int:
    """The fewest bits of a block's weights."""
    return min(grid.bits for name in block.layers for grid in layers[name].weights)
