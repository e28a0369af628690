"""The error that caching or quantisation adds at every step, before and after DEC (CacheQuant figures 4 and 5).

    python err_add/dec.py configs/fashion.yaml --error cache|quant [--set KEY=VALUE]

The errors come in closed form from the sums that stages 2 and 5 gather, relative to the target's mean square.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cachequant.cache.feature_cache import FeatureCache
from cachequant.cli import guarded
from cachequant.cli_commands import stages_of
from cachequant.errors import UserError
from cachequant.evaluation.errors import relative_errors
from cachequant.evaluation.plots import curve_figure, save_figure
from cachequant.pipeline.dec_quant import gather_products
from cachequant.pipeline.stages import Stages
from cachequant.quant.convert import install
from cachequant.storage import save_json

Curves = dict[str, dict[int, float]]


def cache_curves(stages: Stages) -> Curves:
    """Error of the reused feature: raw, and corrected by stage 3's maps."""
    moments, _ = stages.moments()
    if not moments:
        raise UserError(
            "there is no cached step or correction.cache is false: nothing to study, set cache.interval above 1"
        )
    before, after = relative_errors(moments, stages.context.config.correction.ridge)
    return {"reused as it is": before, "corrected": after}


def quant_curves(stages: Stages) -> Curves:
    """Error of each consumer's integer product: as it is, and corrected by stage 5's maps."""
    (schedule, _), (correction, _), (state, _) = stages.schedule(), stages.cache_correction(), stages.quant()
    if state is None:
        raise UserError("quant.enabled is false: nothing to study, enable quantisation")
    context = stages.context
    if context.config.correction.layers == "none":
        raise UserError("correction.layers is none: nothing to study, set it to consumers")
    cache = FeatureCache(schedule, 2 if context.config.correction.forecast else 1, context.adapter.channel_dim)
    handle = install(context.adapter.denoiser, state, cache, correction=correction)
    context.adapter.rebuild()
    try:
        products = gather_products(context, cache, correction, handle)
    finally:
        handle.remove()
        context.adapter.rebuild()
    curves: Curves = {}
    for name, moments in products.items():
        before, after = relative_errors(moments, context.config.correction.ridge)
        curves |= {f"{name}, rounded": before, f"{name}, corrected": after}
    return curves


def main(argv: list[str] | None = None) -> int:
    """Parse, gather, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--error", choices=("cache", "quant"), required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="run folder, default runs/<model.name>")
    args = parser.parse_args(argv)

    def action() -> None:
        stages = stages_of(args.config, args.set, args.device, args.out)
        curves = (cache_curves if args.error == "cache" else quant_curves)(stages)
        folder = stages.store.root / "err_add"
        save_json(folder / f"{args.error}.json", {n: {str(s): v for s, v in c.items()} for n, c in curves.items()})
        save_figure(curve_figure(curves, "relative error (share of the norm)"), folder / f"{args.error}.png")
        for name, curve in curves.items():
            print(f"{name:60} mean {sum(curve.values()) / len(curve):.4f}")
        print(f"wrote {folder / args.error}.png and .json")

    return guarded(action)


if __name__ == "__main__":
    sys.exit(main())
