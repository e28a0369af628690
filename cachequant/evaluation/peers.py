"""Other people's caching as rows of our tables, run through their own packages on a copy of the pipeline.

DeepCache (Ma et al., CVPR 2024; package DeepCache) on U-Nets; DBCache and TaylorSeer (package cache-dit) on transformers.
Each gets as many full steps as we do (DeepCache up to one more under PLMS, whose repeated timestep it counts once) and
runs as much of the network as we do on the others; what else it can choose is tried on calibration noise, and the setting
whose images come closest to the full model's is taken. All in full precision: the packages do not quantise these models
together with their caches.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cachequant.cache.delta_dit import block_list, checked_span
from cachequant.config import CacheConfig
from cachequant.errors import UserError
from cachequant.evaluation.paired import finite_psnr
from cachequant.models.adapter import denoiser_of
from cachequant.models.loading import Generator

PACKAGES = {"deepcache": "DeepCache", "dbcache": "cache_dit", "taylorseer": "cache_dit"}
BISECTIONS = 7
ANYTHING = 1 - 1e-6
PLACES = 3
"""Numbers that DeepCache has for the resnets of a block."""


@dataclass(frozen=True)
class Setting:
    """A peer with what it is told: JSON-like values in the package's own names."""

    peer: str
    options: dict[str, Any]


UNTOUCHED = Setting("full", {})


@dataclass(frozen=True)
class Drawn:
    """Images of a peer.

    Attributes:
        images: [n, C, H, W] in [0, 1].
        seconds: wall-clock time.
        full_step_share: share of the evaluations that ran the whole network, counted.
    """

    images: Tensor
    seconds: float
    full_step_share: float


@dataclass(frozen=True)
class Budget:
    """What a peer may spend.

    Attributes:
        num_steps: T, evaluations of one run.
        full_steps: how many of them run the whole network.
        cache: our own interval and cut; on cached steps a peer runs no more of the network than we do.
    """

    num_steps: int
    full_steps: int
    cache: CacheConfig


def peers_of(pipe: Any) -> tuple[str, ...]:
    """The peers that know this kind of network."""
    return ("deepcache",) if hasattr(denoiser_of(pipe), "up_blocks") else ("dbcache", "taylorseer")


def require_peer(peer: str) -> Any:
    """Its package.

    Raises:
        UserError: it is not installed, or does not fit the libraries that are here.
    """
    name = PACKAGES[peer]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about optional libraries that the package looks for
            package = import_module(name)
    except ImportError as error:
        raise UserError(
            f"row {peer} needs {error.name or name}, which is not installed: pip install 'cachequant[peers]'"
        ) from None
    for logger in [each for each in logging.root.manager.loggerDict if each.lower().startswith("cache_dit")]:
        logging.getLogger(logger).setLevel(logging.ERROR)
    return package


@dataclass(frozen=True)
class Trial:
    """Noise on which settings are compared.

    Attributes:
        generator: of the untouched pipeline, on calibration prompts.
        budget: full steps, and cost of the others.
        seeds: calibration noise.
        batch_size: images at once.
    """

    generator: Generator
    budget: Budget
    seeds: Sequence[int]
    batch_size: int

    def draw(self, setting: Setting) -> Drawn:
        """The images of a setting."""
        return draw_peer(setting, self.generator, self.seeds, self.batch_size)

    def best(self, peer: str) -> Setting:
        """The setting within the budget whose images come closest (PSNR) to the full model's.

        Raises:
            UserError: its package is not there.
        """
        require_peer(peer)
        pipe = self.generator.pipe
        if peer == "deepcache":
            return self._closest(deepcache_choices(pipe, self.budget))
        found = self._closest(masked_choices(peer, pipe, self.budget))
        return self._closest([found, *self._with_thresholds(dynamic_choices(found, self.budget))])

    def _closest(self, choices: Sequence[Setting]) -> Setting:
        """The first of the closest."""
        if len(choices) == 1:
            return choices[0]
        exact, scores = self.draw(UNTOUCHED).images, []
        for choice in tqdm(choices, desc=choices[0].peer, unit="setting", leave=False, disable=None):
            scores.append(float(finite_psnr(self.draw(choice).images, exact, 1.0).mean()))
        return choices[scores.index(max(scores))]

    def _with_thresholds(self, choices: Sequence[Setting]) -> list[Setting]:
        """Each with the smallest threshold that keeps to the budget's full steps on this noise, by bisection of [0, 1).

        Left out where none does (from 1 on, the package reuses whatever it finds).
        """
        found = []
        for choice in choices:
            low, high = 0.0, ANYTHING
            if not self._affordable(_at(choice, high)):
                continue
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                low, high = (low, middle) if self._affordable(_at(choice, middle)) else (middle, high)
            found.append(_at(choice, high))
        return found

    def _affordable(self, setting: Setting) -> bool:
        return self.draw(setting).full_step_share * self.budget.num_steps < self.budget.full_steps + 0.5


def draw_peer(setting: Setting, generator: Generator, seeds: Sequence[int], batch_size: int) -> Drawn:
    """One image per seed from a copy of the generator's pipeline with the peer at work; the pipeline itself is not touched.

    Raises:
        UserError: the package is not there.
    """
    twin = _twin(generator.pipe)
    count = _StepCount(twin, setting.options.get("Fn_compute_blocks", 0))
    _ATTACH[setting.peer](twin, setting.options)
    draw = replace(generator, pipe=twin)
    start = time.perf_counter()
    images = torch.cat([draw(batch) for batch in _batches(seeds, batch_size)])
    return Drawn(images, time.perf_counter() - start, count.share)


def _batches(seeds: Sequence[int], size: int) -> list[list[int]]:
    return [list(seeds[i : i + size]) for i in range(0, len(seeds), size)]


def _twin(pipe: Any) -> Any:
    """The pipeline, of a subclass of its own, around a copy of its denoiser: the packages wrap a class and modules."""
    kind, denoiser = type(pipe), denoiser_of(pipe)
    own = as_diffusers_own(copy.deepcopy(denoiser))
    parts = {name: own if part is denoiser else part for name, part in pipe.components.items()}
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    twin = type(kind.__name__, (kind,), {"__module__": kind.__module__})(**parts)
    if hasattr(pipe, "labels"):  # of an argument that is no part
        twin.labels = pipe.labels
    twin.set_progress_bar_config(disable=True)
    return twin


def as_diffusers_own(denoiser: Any) -> Any:
    """Name the module of diffusers' class as a denoiser's own: cache-dit leaves subclasses from elsewhere unpatched."""
    places = [kind.__module__ for kind in type(denoiser).__mro__]
    denoiser.__module__ = next((place for place in places if place.startswith("diffusers.")), places[0])
    return denoiser


@dataclass
class _StepCount:
    """Counts evaluations, and those that run what cached steps leave out.

    Attributes:
        pipe: with its own denoiser.
        first_cached: the first block of a transformer that cached steps leave out.
    """

    pipe: Any
    first_cached: int
    every: int = field(default=0, init=False)
    deep: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        denoiser: Any = denoiser_of(self.pipe)
        if hasattr(denoiser, "up_blocks"):
            first, deep = denoiser.conv_in, denoiser.mid_block.resnets[0]
        else:
            first, deep = denoiser.pos_embed, block_list(denoiser)[self.first_cached]
        first.register_forward_hook(lambda *_: self._add("every"))
        deep.register_forward_hook(lambda *_: self._add("deep"))

    def _add(self, name: str) -> None:
        setattr(self, name, getattr(self, name) + 1)

    @property
    def share(self) -> float:
        """Share of the evaluations that were full."""
        return self.deep / self.every


def deepcache_choices(pipe: Any, budget: Budget) -> list[Setting]:
    """Uniform intervals, and the branches that leave at most our decoder positions to cached steps."""
    branches = [package_branch(denoiser_of(pipe), branch) for branch in range(budget.cache.branch + 1)]
    return [Setting("deepcache", {"cache_interval": budget.cache.interval, "cache_branch_id": b}) for b in branches]


def package_branch(denoiser: Any, branch: int) -> int:
    """DeepCache's number for our `cache.branch`, which leaves that many decoder positions and one more to cached steps.

    The package numbers resnets from the end, three places a block, whether or not a block has three (`set_params`).

    Raises:
        UserError: it has no number for that position.
    """
    left = branch
    for block, up_block in enumerate(reversed(denoiser.up_blocks)):
        resnets = len(up_block.resnets)
        if left < min(resnets, PLACES):
            return PLACES * block + left
        left -= resnets
        if left < 0:
            break
    raise UserError(
        f"cache.branch is {branch}, expected one of the last {PLACES} resnets of a decoder block for DeepCache: change it"
    )


def _attach_deepcache(twin: Any, options: dict[str, Any]) -> None:
    helper = require_peer("deepcache").DeepCacheSDHelper(twin)
    helper.set_params(**options)
    helper.enable()


def step_masks(num_steps: int, full_steps: int) -> list[list[int]]:
    """Which steps are full (1), `full_steps` of them: evenly spread, or with 2 or half of them in a row before that."""
    masks = []
    for warm in sorted({1, 2, full_steps // 2}):
        if 1 <= warm <= full_steps:
            rest, first = full_steps - warm + 1, warm - 1
            later = {first + (i * (num_steps - first)) // rest for i in range(rest)}
            masks.append([int(step < warm or step in later) for step in range(num_steps)])
    return masks


def masked_choices(peer: str, pipe: Any, budget: Budget) -> list[Setting]:
    """Masks × how the blocks outside our span lie before and behind the cached ones × orders of the Taylor series."""
    transformer = denoiser_of(pipe)
    first, last = checked_span(transformer, budget.cache.span)
    outside = len(block_list(transformer)) - (last - first + 1)
    fronts = sorted({1, max(1, outside // 3), max(1, 2 * outside // 3), max(1, first), outside})
    orders = (1, 2) if peer == "taylorseer" else (None,)
    common = {"max_warmup_steps": budget.num_steps, "steps_computation_policy": "static"}  # the mask shortens warm-up
    return [
        Setting(peer, {
            "Fn_compute_blocks": front, "Bn_compute_blocks": outside - front, "taylorseer_order": order,
            "steps_computation_mask": mask, **common,
        })
        for mask in step_masks(budget.num_steps, budget.full_steps) for front in fronts for order in orders
    ]  # fmt: skip


def dynamic_choices(found: Setting, budget: Budget) -> list[Setting]:
    """A setting without its mask: the package decides by a threshold, which is still to be found."""
    kept = {key: value for key, value in found.options.items() if not key.startswith("steps_")}
    kept["max_cached_steps"] = budget.num_steps - budget.full_steps
    warm_ups = sorted({1, max(1, budget.full_steps // 2)})
    return [Setting(found.peer, {**kept, "max_warmup_steps": warm}) for warm in warm_ups]


def _at(setting: Setting, threshold: float) -> Setting:
    return Setting(setting.peer, {**setting.options, "residual_diff_threshold": threshold})


def _attach_cache_dit(twin: Any, options: dict[str, Any]) -> None:
    package, own = require_peer("dbcache"), dict(options)
    order = own.pop("taylorseer_order")
    calibrator = None if order is None else package.TaylorSeerCalibratorConfig(taylorseer_order=order)
    package.enable_cache(twin, cache_config=package.DBCacheConfig(**own), calibrator_config=calibrator)


_ATTACH: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "full": lambda *_: None, "deepcache": _attach_deepcache, "dbcache": _attach_cache_dit, "taylorseer": _attach_cache_dit,
}  # fmt: skip
