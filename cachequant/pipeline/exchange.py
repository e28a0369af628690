"""Plans and checkpoints of torch_quantizer: a plan's integers as one, and a plan with the integers of one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cachequant.errors import UserError
from cachequant.kernels.reference import Geometry
from cachequant.kernels.torch_quantizer import (
    ALIGNMENT,
    Held,
    from_checkpoint,
    none_supported,
    to_checkpoint,
    unsupported,
)
from cachequant.models.adapter import denoiser_of
from cachequant.models.loading import load_pipeline
from cachequant.models.original.checkpoint import read_checkpoint
from cachequant.models.skeleton import build_skeleton
from cachequant.plan import Plan
from cachequant.quant.convert import fitting_layers
from cachequant.storage import file_hash, write_atomically
from cachequant.types import AffineMap, Correction, QuantState


@dataclass(frozen=True)
class Exported:
    """What a checkpoint for torch_quantizer holds.

    Attributes:
        content: its state dict.
        layers: names of the layers in it.
        left_out: quantised layer -> why it is not.
        skip_layer: what `torch_quantizer.src.quant_model.QuantModel` must be given: layers, counted from 1, that it would
            replace although nothing is there to load.
        notes: what of the plan its run does not do.
    """

    content: dict[str, Tensor]
    layers: list[str]
    left_out: dict[str, str]
    skip_layer: list[int]
    notes: list[str]

    def save(self, path: Path) -> None:
        """Write what `torch.load` reads, complete or not at all.

        Raises:
            UserError: there is something already, or it cannot be written.
        """
        if path.exists():
            raise UserError(f"{path} is there already, expected a new file: choose another")
        write_atomically(path, self._write)

    def _write(self, path: Path) -> None:
        with open(path, "wb") as handle:  # by its name torch would hide the system's reason, such as a full disk
            torch.save(self.content, handle)

    def summary(self) -> str:
        """Lines for people."""
        return "\n".join(
            [
                f"layers       {len(self.layers)} in torch_quantizer's layout",
                *(f"left out     {name}: {reason}" for name, reason in self.left_out.items()),
                *(f"note         {note}" for note in self.notes),
            ]
        )


def export_plan(plan: Plan) -> Exported:
    """A plan's layers as torch_quantizer holds them, corrections of their products folded in.

    Raises:
        UserError: it quantises no layer that torch_quantizer supports, or its model cannot be had.
    """
    if plan.quant is None or not plan.quant.layers:
        raise UserError("this plan quantises nothing, expected integers: calibrate with quant.enabled=true")
    network, steps = _denoiser(plan), plan.schedule.num_steps
    layers, left_out = dict[str, Held](), dict[str, str]()
    for name, source, layer, maps in fitting_layers(network, plan.quant, plan.correction):
        held = Held(layer, source.bias, maps or {})
        reason = unsupported(held, Geometry.of(source), steps)
        if reason is None:
            layers[name] = held
        else:
            left_out[name] = reason
    if not layers:
        raise none_supported(left_out.values())
    skip = _random_without(network, layers)
    return Exported(to_checkpoint(layers, steps), list(layers), left_out, skip, _notes(plan, skip))


def import_checkpoint(plan: Plan, path: Path) -> Plan:
    """A plan with the layers of a torch_quantizer checkpoint; schedule and everything else are those of `plan`.

    A bias that is not the model's becomes part of the corrections: a·p + b + bias is the same sum.

    Args:
        plan: of the same model and number of steps.
        path: state dict, read weights-only.

    Raises:
        UserError: the file is no such checkpoint, damaged, or of another network or number of steps.
    """
    found = from_checkpoint(read_checkpoint(path).tensors)
    steps = plan.schedule.num_steps
    for name, held in found.items():
        if len(held.layer.inputs[0].steps) != steps:
            rows = len(held.layer.inputs[0].steps)
            raise UserError(f"{path} has {rows} steps ({name[:80]}), the plan {steps}: calibrate one for as many")
    network = _denoiser(plan)
    layers = {name: held.layer for name, held in found.items()}
    try:
        sources = {name: source for name, source, _, _ in fitting_layers(network, QuantState(layers))}
    except UserError as error:
        raise UserError(f"{path} is not of the plan's model: {error}") from None
    maps = {name: _with_bias(held, sources[name].bias, steps) for name, held in found.items()}
    return _with_layers(plan, QuantState(layers), maps, f"{len(layers)} layers of sha256 {file_hash(path)[:12]}")


def _denoiser(plan: Plan) -> nn.Module:
    """The plan's network: from the plan where it holds it, else as `model` of its configuration says."""
    if plan.remainder is not None:
        return build_skeleton(plan)
    network: nn.Module = denoiser_of(load_pipeline(plan.config.model, "cpu"))
    return network


def _random_without(network: nn.Module, layers: Collection[str]) -> list[int]:
    """Places, from 1, of the layers that `QuantModel` replaces by random integers unless it is told to skip them."""
    kinds = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return [
        place
        for place, (name, module) in enumerate(kinds, 1)
        if name not in layers and not any(size % ALIGNMENT for size in module.weight.shape[:2])
    ]


def _notes(plan: Plan, skip: list[int]) -> list[str]:
    """What whoever runs the checkpoint must know."""
    steps, full, correction = plan.schedule.num_steps, len(plan.schedule.refresh_steps), plan.correction
    notes = [
        f"torch_quantizer runs all {steps} steps in full, this plan {full}: it caches nothing" if full < steps else "",
        "the corrections of the cached feature are not in it" if correction.cache else "",
        "the corrections of the prediction are not in it" if correction.output else "",
        "attention operands stay in full precision" if plan.quant and plan.quant.operands else "",
        f"load it into QuantModel(model, n_steps={steps}, skip_layer={skip}): real_quant, which skips none, would fill "
        f"{len(skip)} other layers with random integers" if skip else f"load it with real_quant(model, 8, {steps}, path)",
    ]  # fmt: skip
    return [note for note in notes if note]


def _with_bias(held: Held, bias: Tensor | None, num_steps: int) -> dict[int, AffineMap]:
    """The corrections that give with the model's bias what the checkpoint gives with its own."""
    maps = dict(held.maps)
    own = torch.zeros_like(held.layer.weights[0].scale) if held.bias is None else held.bias.float()
    rest = own if bias is None else own - bias.detach().float()
    if not rest.any():
        return maps
    plain = AffineMap.identity(len(rest))
    rows = {step: maps.get(step, plain) for step in range(num_steps)}
    return {step: AffineMap(affine.scale, affine.shift + rest) for step, affine in rows.items()}


def _with_layers(plan: Plan, state: QuantState, maps: Mapping[str, dict[int, AffineMap]], origin: str) -> Plan:
    """The plan with these layers and their corrections in the place of its own of the same names."""
    before = plan.quant or QuantState()
    others = {name: rows for name, rows in plan.correction.layers.items() if name not in state.layers}
    corrected = {name: rows for name, rows in maps.items() if rows}
    correction = Correction(plan.correction.cache, {**others, **corrected}, plan.correction.output)
    remainder, quantised = plan.remainder, {f"{name}.weight" for name in state.layers}
    if remainder is not None:
        kept = {name: tensor for name, tensor in remainder.tensors.items() if name not in quantised}
        remainder = replace(remainder, tensors=kept)
    provenance = {key: value for key, value in plan.provenance.items() if key != "weight_bits"}
    return replace(
        plan,
        correction=correction,
        quant=QuantState({**before.layers, **state.layers}, before.operands),
        provenance={**provenance, "imported": origin},
        remainder=remainder,
    )
