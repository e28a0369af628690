"""A quantised convolution or linear layer: integer product, then one epilogue that absorbs every correction."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.correction import Moments, fold_into_epilogue, solve_held_out
from cachequant.kernels.reference import Geometry, epilogue, product
from cachequant.quant.affine import quantize, search_grid
from cachequant.quant.formats import centred_weight
from cachequant.quant.halves import even_and_odd
from cachequant.quant.observer import StepQuantizer
from cachequant.types import AffineMap, LayerQuant, WeightGrid

Layer = nn.Conv2d | nn.Linear


class Mode(Enum):
    """What a quantised layer does when it is called.

    FLOAT: the original layer. RECORD: the same, and remember the output as the target of FIT. OBSERVE: the same, and pool
    the input for the range search. QUANTIZED: integers. PAIR: the original layer, and add (integer product, exact product)
    of the h segment to the moments. FIT: integers, fit the recorded target, and apply the fit at once.
    """

    FLOAT = "float"
    RECORD = "record"
    OBSERVE = "observe"
    QUANTIZED = "quantized"
    PAIR = "pair"
    FIT = "fit"


def quantize_weight(weight: Tensor, bits: int, search: str, symmetric: bool = False) -> WeightGrid:
    """Per-output-channel grid of a weight [O, I, ...], asymmetric (CacheQuant section 4.1) or around zero.

    Args:
        weight: of a convolution or linear layer.
        bits: grid size.
        search: range search of `cachequant.quant.affine.search_grid`.
        symmetric: 0 stands in the middle of the grid, and what is searched is one bound of the magnitude.
    """
    rows = weight.detach().float().flatten(1)  # [O, n]
    scale, zero_point = search_grid(torch.cat([rows, -rows], dim=1) if symmetric else rows, bits, search)
    if symmetric:
        zero_point = torch.full_like(zero_point, 2.0 ** (bits - 1))
    values = quantize(rows, scale[:, None], zero_point[:, None], bits).to(torch.uint8)
    return WeightGrid(values.view(weight.shape), scale, zero_point, bits)


class QuantLayer(nn.Module):
    """Replaces one `nn.Conv2d` or `nn.Linear`, keeping its name in the network.

    The input is one segment, or two behind a decoder concat: h and skip have their own grids, and only the h segment's
    product is corrected: out = a₂·(s·p_h) + b₂ + s'·p_skip + bias (CacheQuant equation 11, with the bias outside).

    Args:
        source: the layer that is replaced.
        state: weights and input tables; tables may still be empty before calibration.
        clock: tells the step; the same object for all layers.
        corrections: step -> map of the first segment's product.
        searches: range search of the activations.
    """

    def __init__(
        self,
        source: Layer,
        state: LayerQuant,
        clock: FeatureCache,
        corrections: dict[int, AffineMap] | None = None,
        search: str = "mse",
    ) -> None:
        super().__init__()
        self.clock, self.mode = clock, Mode.QUANTIZED
        self.geometry, self.widths, self.weights = Geometry.of(source), state.widths, state.weights
        self.quantizers = [StepQuantizer(t.bits, search, t if len(t.steps) else None, t.format) for t in state.inputs]
        self.corrections: dict[int, AffineMap] = dict(corrections or {})
        self.moments: dict[int, Moments] = {}
        self.ridge, self.held_out = 0.0, False
        self.samples: int | None = None
        self._source = (source,)  # a tuple hides it from the module tree
        self._targets: list[Tensor] = []  # of the chunks of a batch, in order
        self._halves = (Moments(), Moments())  # of the step that FIT is at: even and odd samples
        self._row = 0  # of the batch, at which the next chunk begins
        self._epilogues: dict[int, tuple[tuple[Tensor, Tensor | None], ...]] = {}
        device = self.weights[0].values.device if source.weight.is_meta else source.weight.device
        self.bias: Tensor | None
        self.register_buffer("bias", None if source.bias is None else source.bias.detach().float(), persistent=False)
        for i, grid in enumerate(self.weights):
            centred = centred_weight(grid, device)
            if source.weight.dim() == 4 and source.weight.is_contiguous(memory_format=torch.channels_last):
                centred = centred.contiguous(memory_format=torch.channels_last)
            self.register_buffer(f"weight_{i}", centred, persistent=False)
            self.register_buffer(f"weight_scale_{i}", grid.scale.to(device), persistent=False)

    @property
    def source(self) -> Layer:
        """The layer that was replaced."""
        return self._source[0]

    @property
    def state(self) -> LayerQuant:
        """Everything that is saved about this layer."""
        return LayerQuant(self.weights, tuple(q.table for q in self.quantizers), self.widths)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """The layer in its current mode: [B, I, H, W] -> [B, O, H', W'], or [..., I] -> [..., O]."""
        return _BEHAVIOUR[self.mode](self, x)

    def set_corrections(self, corrections: dict[int, AffineMap]) -> None:
        """Replace all maps; the epilogues are folded again."""
        self.corrections = dict(corrections)
        self._epilogues.clear()

    def start_fit(self, new_step: bool) -> None:
        """Before a RECORD pass: drop targets that nothing fitted and, at a new step, the pairs of the step before."""
        self._targets.clear()
        self._row = 0
        if new_step:
            self._halves = (Moments(), Moments())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLayer:
        """`.to()` moves the replaced layer too, and what was folded on the old device is folded again."""
        self.source._apply(fn)
        self._epilogues.clear()
        super()._apply(fn, recurse)
        return self

    def finish_step(self, step: int) -> None:
        """Turn what was observed into the row of `step`."""
        for quantizer in self.quantizers:
            quantizer.finish_step(step)
        self._epilogues.clear()

    def _segments(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.widths, dim=self.geometry.channel_dim) if len(self.widths) > 1 else (x,)

    def _integer_products(self, x: Tensor) -> list[Tensor]:
        """Integer product of each segment, without its scale."""
        step = self.clock.step
        return [
            product(q.integers(part, step)[0], self.get_buffer(f"weight_{i}"), self.geometry)
            for i, (part, q) in enumerate(zip(self._segments(x), self.quantizers, strict=True))
        ]

    def _product_scale(self, segment: int) -> Tensor:
        """[O] factor of a segment's integer product at this step: activation scale × weight scales."""
        return self.get_buffer(f"weight_scale_{segment}") * self.quantizers[segment].row(self.clock.step)[0]

    def _epilogue_of_step(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """(scale, shift) per segment with the correction and the bias folded in, computed once per step index."""
        step = self.clock.step
        if step not in self._epilogues:
            correction = self.corrections.get(step)
            if correction is not None:
                correction = correction.to(self.get_buffer("weight_0").device)
            first = fold_into_epilogue(self._product_scale(0), self.bias, correction)
            rest = tuple((self._product_scale(i), None) for i in range(1, len(self.widths)))
            self._epilogues[step] = (first, *rest)
        return self._epilogues[step]

    def _float(self, x: Tensor) -> Tensor:
        return self.source(x)

    def _record(self, x: Tensor) -> Tensor:
        output = self.source(x)
        self._targets.append(output)
        return output

    def _observe(self, x: Tensor) -> Tensor:
        for quantizer, part in zip(self.quantizers, self._segments(x), strict=True):
            quantizer.observe(part)
        return self.source(x)

    def _quantized(self, x: Tensor) -> Tensor:
        parts = zip(self._integer_products(x.float()), self._epilogue_of_step(), strict=True)
        outputs = [epilogue(p, scale, shift, self.geometry.channel_dim) for p, (scale, shift) in parts]
        return (outputs[0] if len(outputs) == 1 else outputs[0].add_(outputs[1])).to(x.dtype)

    def _pair(self, x: Tensor) -> Tensor:
        """Paper equation 11's statistics: both sides see the same input, the bias is in neither."""
        head = self._segments(x.float())[0]
        exact = product(head, self.source.weight[:, : self.widths[0]].float(), self.geometry)
        integers = product(
            self.quantizers[0].integers(head, self.clock.step)[0], self.get_buffer("weight_0"), self.geometry
        )
        rounded = epilogue(integers, self._product_scale(0), None, self.geometry.channel_dim)
        dim = self.geometry.channel_dim % x.dim()
        self.moments.setdefault(self.clock.step, Moments()).update((rounded,), exact, dim)
        return self.source(x)

    def _fit(self, x: Tensor) -> Tensor:
        """Regress the full-precision output at the same x_t on the integer product, then use the map at once."""
        assert self._targets, "FIT needs a RECORD pass before it"
        dim = self.geometry.channel_dim % x.dim()
        parts = self._integer_products(x.float())
        scaled = [epilogue(p, self._product_scale(i), None, dim) for i, p in enumerate(parts)]
        rest = sum(scaled[1:], torch.zeros((), device=x.device))
        if self.bias is not None:
            shape = [1] * x.dim()
            shape[dim] = -1
            rest = rest + self.bias.view(shape)
        target = self._targets.pop(0).float() - rest
        for places, moments in zip(even_and_odd(len(x), self.samples, self._row), self._halves, strict=True):
            if len(places):
                index = places.to(x.device)
                moments.update((scaled[0][index],), target[index], dim)
        self._row += len(x)
        fitted = self._solve()
        self.corrections[self.clock.step] = fitted
        self._epilogues.pop(self.clock.step, None)
        return (fitted.apply(scaled[0], channel_dim=dim) + rest).to(x.dtype)

    def _solve(self) -> AffineMap:
        """The map from the pairs of all chunks so far."""
        if self.held_out:
            return solve_held_out(self._halves, self.ridge)
        grams = [half.gram for half in self._halves if half.gram is not None]
        return Moments(sum(grams[1:], grams[0])).solve(self.ridge)


_BEHAVIOUR: dict[Mode, Callable[[QuantLayer, Tensor], Tensor]] = {
    Mode.FLOAT: QuantLayer._float,
    Mode.RECORD: QuantLayer._record,
    Mode.OBSERVE: QuantLayer._observe,
    Mode.QUANTIZED: QuantLayer._quantized,
    Mode.PAIR: QuantLayer._pair,
    Mode.FIT: QuantLayer._fit,
}
