"""Other packages' accelerations as steps of the bench: DeepCache, cache-dit and torchao, each compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.cache.deepcache import shallow_copy
from cachequant.cache.feature_cache import FeatureCache
from cachequant.evaluation.peers import as_diffusers_own, package_branch
from cachequant.models.adapter import Adapter
from cachequant.pipeline.compiled import Compile, Whole
from cachequant.pipeline.context import Context
from cachequant.pipeline.first_calls import first_call
from cachequant.pipeline.hook import Call, StepFunction
from cachequant.schedule import uniform_schedule
from cachequant.types import AffineMap

LEAST_ROWS = 17
"""torch's INT8 product takes no fewer rows of activations."""


@contextmanager
def deepcache(adapter: Adapter, interval: int, branch: int, compile: Compile) -> Iterator[Adapter]:
    """The peer's wrappers around a U-Net's blocks, as an adapter; its full and its skipping step are compiled apart.

    DeepCacheSDHelper keeps its features itself and tells its steps by a position in the scheduler's list, which is set
    here: 0 is a full step, 1 a skipping one.
    """
    from DeepCache import DeepCacheSDHelper

    denoiser: Any = adapter.denoiser
    helper = DeepCacheSDHelper(SimpleNamespace(unet=denoiser, scheduler=None))
    helper.set_params(cache_interval=interval, cache_branch_id=package_branch(denoiser, branch))
    helper.enable()
    del vars(denoiser)["forward"]  # which would look the position up
    helper.start_timestep = 0
    step = Whole(denoiser, compile)
    try:
        yield _DeepCache(adapter, helper, step)  # type: ignore[misc]
    finally:
        helper.reset_states()
        for module in denoiser.modules():  # the helper's own way back leaves attributes behind
            vars(module).pop("forward", None)


class _DeepCache:
    """Full and cached steps of an enabled helper; the feature handed around is empty."""

    def __init__(self, adapter: Adapter, helper: Any, step: Whole) -> None:
        self.adapter, self.helper, self.step = adapter, helper, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    def full(self, x: Tensor, timestep: Any, cond: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Every block, whose outputs the helper keeps."""
        self.helper.cur_timestep = 0
        return self.step.full(x, timestep, cond, **kwargs)

    def cached(
        self,
        x: Tensor,
        timestep: Any,
        cond: Any,
        cached_feature: Tensor,
        correction: AffineMap | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """What the helper does not skip."""
        self.helper.cur_timestep = 1
        return self.step.full(x, timestep, cond, **kwargs)[0]


@contextmanager
def cache_dit(context: Context, interval: int, compile: Compile) -> Iterator[tuple[StepFunction, FeatureCache]]:
    """The peer's Dual Block Cache on a transformer: the same blocks and steps as ours, chosen by its mask of steps.

    Its control flow between the blocks is kept out of torch.compile by the package, so the blocks are compiled one by one.
    """
    import cache_dit as peer
    from cache_dit.caching.patch_functors import DiTPatchFunctor

    adapter: Any = context.adapter
    twin: Any = as_diffusers_own(shallow_copy(adapter.denoiser))
    schedule, blocks, (first, last) = (
        uniform_schedule(context.num_steps, interval),
        twin.transformer_blocks,
        adapter.span,
    )
    config = peer.DBCacheConfig(
        Fn_compute_blocks=first,
        Bn_compute_blocks=len(blocks) - 1 - last,
        max_warmup_steps=0,
        enable_separate_cfg=False,
        num_inference_steps=context.num_steps,
        steps_computation_mask=[int(schedule.is_refresh(step)) for step in range(context.num_steps)],
        steps_computation_policy="static",
    )
    described = peer.BlockAdapter(
        transformer=twin, blocks=blocks, forward_pattern=peer.ForwardPattern.Pattern_3, patch_functor=DiTPatchFunctor(),
        check_forward_pattern=True,
    )  # fmt: skip
    peer.enable_cache(described, cache_config=config)
    cache = FeatureCache(schedule)

    def step(call: Call) -> Tensor:
        if cache.step == 0:
            peer.refresh_context(twin, cache_config=config)
        return twin(call.x, call.timestep, **call.kwargs, return_dict=False)[0]

    try:
        for block in blocks:
            block.forward = compile(block.forward)
        yield step, cache
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
        peer.disable_cache(described)


@contextmanager
def torchao(context: Context) -> Iterator[nn.Module]:
    """A copy of the denoiser whose linear layers are the peer's: INT8 weights, activations quantised as they come.

    Its convolutions stay in half precision: the package has no INT8 ones. Layers with too few rows of activations for
    torch's INT8 product stay too.
    """
    from torch._inductor import config as inductor
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    call = first_call(context)
    network = copy.deepcopy(context.adapter.denoiser)
    rows = _rows_of_linears(network, call)
    fits = _fits(rows)
    quantize_(network, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), filter_fn=fits)
    with inductor.patch(force_fuse_int_mm_with_mul=True):  # of the package's recommended settings what is not tuning
        yield network


def _fits(rows: dict[str, int]) -> Callable[[nn.Module, str], bool]:
    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and rows.get(name, 0) >= LEAST_ROWS

    return fits


@torch.no_grad()
def _rows_of_linears(network: nn.Module, call: Call) -> dict[str, int]:
    """Linear layer -> rows of activations in one evaluation."""
    rows: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def seen(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows[name] = inputs[0].numel() // inputs[0].shape[-1]

        return seen

    linears = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears]
    try:
        Whole(network).full(call.x, call.timestep, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return rows
