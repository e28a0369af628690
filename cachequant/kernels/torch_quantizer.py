"""The checkpoint layout of the INT8 package torch_quantizer: written from a plan's integers, and read back.

Read in the source of github.com/ThisisBillhe/torch_quantizer 0.1.0 (commit 942384f; operators as of 374e0f0). Per layer:
`int_weight` int8 [O, I] or [O, kh, kw, I] (symmetric per channel), `act_delta` and `act_zp` float16 [T] of an activation
q = clip(round(x / delta + zp), -128, 127), `act_times_weight_delta` m and `zp_times_weight_channel_sum` z float32 [T, O],
`bias` float32 [O]; the output is (Σ q·w - z)·m + bias. Its layers count steps downwards: row T - 1 is the first evaluation.

A correction a·p + b of the product folds into both tables, m = delta·s_w·a and z = zp·Σw - b / m, exactly but for float32's
rounding. What was folded stands beside them under names of ours, which `real_quant` passes over.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cachequant.errors import UserError
from cachequant.kernels.reference import Geometry
from cachequant.types import ActivationTable, AffineMap, LayerQuant, WeightGrid

BUFFERS = ("int_weight", "act_delta", "act_zp", "act_times_weight_delta", "zp_times_weight_channel_sum")
"""What a quantised layer has, beside a bias."""

FOLDED = ("correction_scale", "correction_shift")
"""float32 [T, O] of a corrected layer: the a and b that its tables hold already."""

HALF_GRID = 128
"""What its zero points are lower than ours: its integers are signed."""

ALIGNMENT = 32
"""Its kernels take input and output channels in multiples of this."""

HALF_PRECISION = 2.0**-11
"""Relative rounding error of a float16 that is not subnormal."""


@dataclass(frozen=True)
class Held:
    """A layer with everything that its buffers hold.

    Attributes:
        layer: integers and table.
        bias: [O] or None.
        maps: step -> correction of the layer's product (a₂, b₂).
    """

    layer: LayerQuant
    bias: Tensor | None = None
    maps: Mapping[int, AffineMap] = field(default_factory=dict)


def unsupported(held: Held, geometry: Geometry, num_steps: int) -> str | None:
    """Why torch_quantizer cannot run a layer; None where it can.

    Weights of fewer than 8 bits are no limit: int8 holds them exactly.

    Args:
        held: the layer.
        geometry: of the layer that it replaces.
        num_steps: T.
    """
    if len(held.layer.weights) > 1:
        return "its input is quantised in two halves"
    return (
        _geometry_limit(geometry)
        or _weight_limit(held.layer.weights[0])
        or _input_limit(held.layer.inputs[0], num_steps)
        or _correction_limit(held, num_steps)
    )


def none_supported(reasons: Collection[str]) -> UserError:
    """What to tell whoever has a plan of which torch_quantizer can run no layer.

    Args:
        reasons: of every layer.
    """
    reason, count = Counter(reasons).most_common(1)[0]
    return UserError(
        f"torch_quantizer can run none of the plan's {len(reasons)} layers ({count} of them: {reason}): calibrate with "
        "quant.weight_symmetric=true and 8-bit activations, or use another backend"
    )


def to_buffers(held: Held, num_steps: int) -> dict[str, Tensor]:
    """The buffers of a layer for which `unsupported` is None, on the CPU.

    The kernels divide by delta in half precision, so delta is rounded to it before anything is folded. A step that the
    plan has no row for (a deep layer that it does not run) takes the row before, as everywhere.

    Args:
        held: the layer.
        num_steps: T.
    """
    ((weight,), (table,)), channels = (held.layer.weights, held.layer.inputs), len(held.layer.weights[0].scale)
    delta, zero = _input_rows(table, num_steps)
    values = _centred(weight).to(torch.int8)
    product, sums = _folded(held, num_steps)
    return {
        "int_weight": values.permute(0, 2, 3, 1).contiguous() if values.dim() == 4 else values,
        "act_delta": delta.half(),
        "act_zp": zero.half(),
        "act_times_weight_delta": product.float(),
        "zp_times_weight_channel_sum": sums.float(),
        "bias": torch.zeros(channels) if held.bias is None else held.bias.detach().float().cpu(),
    }


def from_buffers(buffers: Mapping[str, Tensor]) -> Held:
    """The layer of one layer's buffers, with a table row for every step.

    Raises:
        UserError: a buffer is missing or of another type or shape, or they contradict each other.
    """
    _refuse_other_shapes(buffers)
    values, zero = buffers["int_weight"], buffers["act_zp"].double()
    delta, sums = buffers["act_delta"].double(), values.flatten(1).long().sum(1).double()  # [T], [O]
    product = buffers["act_times_weight_delta"].double()  # [T, O]
    maps = _maps(buffers)
    factor, shift = _map_rows(maps, *product.shape)
    scale = (product / factor / delta[:, None]).median(0).values  # [O]; every row gives the same but for rounding
    plain = delta[:, None] * scale * factor
    if not torch.allclose(product, plain, rtol=2e-3, atol=1e-9):  # act_delta may have been rounded to half precision
        raise UserError(
            "act_times_weight_delta is not act_delta times one scale per channel: the checkpoint is damaged"
        )
    lift = _lift(shift, product)
    error = (buffers["zp_times_weight_channel_sum"].double() + lift - zero[:, None] * sums).abs()
    if not bool((error <= 0.5 + 1e-3 * (zero[:, None] * sums).abs() + 1e-6 * lift.abs()).all()):
        raise UserError(
            "zp_times_weight_channel_sum does not belong to int_weight and act_zp: the checkpoint is damaged"
        )
    if values.dim() == 4:
        values = values.permute(0, 3, 1, 2).contiguous()
    middle = torch.full((len(sums),), float(HALF_GRID))
    grid = WeightGrid((values.int() + HALF_GRID).to(torch.uint8), scale.float(), middle, 8)
    steps = torch.arange(len(delta), dtype=torch.int32)
    table = ActivationTable(steps, delta.flip(0).float(), zero.flip(0).float() + HALF_GRID, 8)
    return Held(LayerQuant((grid,), (table,), (values.shape[1],)), buffers.get("bias"), maps)


def from_checkpoint(content: Mapping[str, Tensor]) -> dict[str, Held]:
    """Layer name -> layer of a torch_quantizer state dict; other parameters in it are left alone.

    Raises:
        UserError: there is no quantised layer, or one is damaged.
    """
    ending = f".{BUFFERS[0]}"
    names = [key.removesuffix(ending) for key in content if key.endswith(ending)]
    if not names:
        raise UserError(f"the checkpoint holds no '*{ending}', expected torch_quantizer's: convert the model with it")
    found = {}
    for name in names:
        own = {key: content[f"{name}.{key}"] for key in (*BUFFERS, *FOLDED, "bias") if f"{name}.{key}" in content}
        try:
            found[name] = from_buffers(own)
        except UserError as error:
            raise UserError(f"layer {name[:80]}: {error}") from None
    return found


def to_checkpoint(layers: Mapping[str, Held], num_steps: int) -> dict[str, Tensor]:
    """The state dict that `torch_quantizer.real_quant` loads.

    Args:
        layers: name -> layer for which `unsupported` is None.
        num_steps: T.
    """
    content: dict[str, Tensor] = {}
    for name, held in layers.items():
        content |= {f"{name}.{buffer}": value for buffer, value in to_buffers(held, num_steps).items()}
        if held.maps:
            rows = _map_rows(held.maps, num_steps, len(held.layer.weights[0].scale))
            content |= {f"{name}.{key}": value.float() for key, value in zip(FOLDED, rows, strict=True)}
    return content


def _geometry_limit(geometry: Geometry) -> str | None:
    if not geometry.is_conv:
        return None
    if geometry.groups != 1:
        return f"{geometry.groups} groups, expected 1"
    if any(size != 1 for size in geometry.dilation):
        return f"dilation {max(geometry.dilation)}, expected 1"  # its output size leaves dilation out
    if isinstance(geometry.padding, str):
        return f"padding {geometry.padding!r}, expected numbers"
    if geometry.padding[0] != geometry.padding[1]:
        return "other padding of rows than of columns"  # it swaps the two
    return None


def _weight_limit(weight: WeightGrid) -> str | None:
    if weight.format != "int":
        return f"{weight.format} weights, expected integers"
    outputs, inputs = weight.values.shape[:2]
    if outputs % ALIGNMENT or inputs % ALIGNMENT:
        return f"{inputs} input and {outputs} output channels, expected multiples of {ALIGNMENT}"
    centred = _centred(weight)
    if centred.min() < -128 or centred.max() > 127:
        return "asymmetric weights, expected those of quant.weight_symmetric"
    return None


def _input_limit(table: ActivationTable, num_steps: int) -> str | None:
    if table.format != "int":
        return f"{table.format} activations, expected integers"
    if table.bits != 8:
        return f"{table.bits}-bit activations, expected 8"
    if not len(table.steps):
        return "its input was never calibrated"
    if int(table.steps[-1]) >= num_steps:
        return f"a grid of step {int(table.steps[-1])}, expected steps below {num_steps}"
    scale = table.scale.double()
    if ((scale.half().double() - scale).abs() > HALF_PRECISION * scale).any():
        return "an activation scale that half precision does not hold"
    return None


def _correction_limit(held: Held, num_steps: int) -> str | None:
    if not held.maps:
        return None
    if max(held.maps) >= num_steps:
        return f"a correction of step {max(held.maps)}, expected steps below {num_steps}"
    if any(affine.previous is not None for affine in held.maps.values()):
        return "a correction that reads two products"
    product, sums = (rows.float() for rows in _folded(held, num_steps))
    if not bool((product != 0).all() and product.isfinite().all() and sums.isfinite().all()):
        return "a correction whose factor is 0 or whose offset is out of float32's range"
    return None


def _input_rows(table: ActivationTable, num_steps: int) -> tuple[Tensor, Tensor]:
    """delta, rounded to half precision, and zp of every step, the last first: float64 [T] each."""
    known = table.steps.tolist()
    rows = [max(bisect_right(known, step) - 1, 0) for step in reversed(range(num_steps))]
    return table.scale.cpu()[rows].half().double(), table.zero_point.cpu()[rows].double() - HALF_GRID


def _map_rows(maps: Mapping[int, AffineMap], num_steps: int, channels: int) -> tuple[Tensor, Tensor]:
    """a and b of every step, the last first: float64 [T, O] each, 1 and 0 without a map."""
    factor = torch.ones(num_steps, channels, dtype=torch.float64)
    shift = torch.zeros(num_steps, channels, dtype=torch.float64)
    for step, affine in maps.items():
        row = num_steps - 1 - step
        factor[row], shift[row] = affine.scale.double().cpu(), affine.shift.double().cpu()
    return factor, shift


def _folded(held: Held, num_steps: int) -> tuple[Tensor, Tensor]:
    """`act_times_weight_delta` and `zp_times_weight_channel_sum` with the corrections in them: float64 [T, O] each."""
    (weight,), (table,) = held.layer.weights, held.layer.inputs
    delta, zero = _input_rows(table, num_steps)
    factor, shift = _map_rows(held.maps, num_steps, len(weight.scale))
    product = delta[:, None] * weight.scale.cpu().double() * factor
    sums = _centred(weight).flatten(1).long().sum(1).double().cpu()  # [O]
    return product, zero[:, None] * sums - _lift(shift, product)


def _lift(shift: Tensor, product: Tensor) -> Tensor:
    """b in units of the product [T, O]; 0 where there is none, whatever the unit."""
    return torch.where(shift == 0, torch.zeros_like(shift), shift / product)


def _maps(buffers: Mapping[str, Tensor]) -> dict[int, AffineMap]:
    """The corrections that were folded in, by step, without rows that change nothing."""
    if not set(FOLDED) <= set(buffers):
        return {}
    rows = list(zip(*(buffers[name].float().flip(0) for name in FOLDED), strict=True))
    return {step: AffineMap(a, b) for step, (a, b) in enumerate(rows) if bool((a != 1).any() or (b != 0).any())}


def _refuse_other_shapes(buffers: Mapping[str, Tensor]) -> None:
    """Refuse buffers that are not as the layout has them."""
    missing = [name for name in BUFFERS if name not in buffers]
    if missing:
        raise UserError(f"it lacks {', '.join(missing)}, expected {', '.join(BUFFERS)}: the checkpoint is damaged")
    values, delta, zero = (buffers[name] for name in BUFFERS[:3])
    if values.dtype != torch.int8 or values.dim() not in (2, 4):
        raise UserError("int_weight is no int8 matrix or convolution: the checkpoint is damaged")
    table = (delta.numel(), len(values))
    shapes = {"act_delta": table[:1], "act_zp": table[:1], **dict.fromkeys((*BUFFERS[3:], *FOLDED), table)}
    for name, shape in {**shapes, "bias": table[1:]}.items():
        found = buffers.get(name)
        usable = found is None or (found.shape == shape and found.is_floating_point() and found.isfinite().all())
        if not usable:
            raise UserError(f"{name} is not finite numbers of shape {list(shape)}: the checkpoint is damaged")
    whole = bool(((zero == zero.round()) & (zero.abs() <= HALF_GRID) & (zero < HALF_GRID)).all())
    if not whole or not bool((delta > 0).all()) or not len(delta):
        raise UserError("act_delta and act_zp are no grids of signed 8 bits: the checkpoint is damaged")
    if FOLDED[0] in buffers and not bool((buffers[FOLDED[0]] != 0).all()):
        raise UserError(f"{FOLDED[0]} holds a 0: the checkpoint is damaged")


def _centred(weight: WeightGrid) -> Tensor:
    """int32 q - z [O, I, ...]."""
    return weight.values.int() - weight.zero_point.int().view(-1, *[1] * (weight.values.dim() - 1))
