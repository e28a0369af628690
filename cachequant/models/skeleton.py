"""A denoiser from its plan alone: everything but the quantised weights, which the backend takes from the plan itself."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.errors import UserError
from cachequant.models.adapter import denoiser_of
from cachequant.models.loading import load_pipeline, part_name
from cachequant.plan import Plan
from cachequant.types import QuantState, Remainder

ORIGIN = "_cachequant_origin"
"""Attribute of a skeleton: identity of the weights that its plan was made from."""


def remainder_of(pipe: Any, quant: QuantState) -> Remainder:
    """What a plan must hold beside its integers, from the pipeline that it was made for."""
    denoiser = denoiser_of(pipe)
    quantised = {f"{name}.weight" for name in quant.layers}
    tensors = {name: tensor.detach() for name, tensor in _tensors(denoiser) if name not in quantised}
    role = next(name for name, part in pipe.components.items() if part is denoiser)
    others = [name for name, part in pipe.components.items() if part is not None and name not in (role, "scheduler")]
    recipe = {
        "role": role,
        "denoiser": _recipe(denoiser),
        "scheduler": _recipe(pipe.scheduler),
        "pipeline": _class_name(type(pipe)),
        "others": sorted(others),
    }
    return Remainder(tensors, recipe)


def build_skeleton(plan: Plan) -> nn.Module:
    """The denoiser of a plan with its quantised weights on the meta device, where they take no memory.

    It runs once the plan is enabled on it, and only then.

    Raises:
        UserError: the plan does not hold the rest of its denoiser, or holds too little.
    """
    if plan.remainder is None or plan.quant is None:
        raise UserError(
            "this plan holds no denoiser, expected a quantised one: load the model and enable the plan on it"
        )
    with torch.device("meta"):
        denoiser: nn.Module = _make(plan.remainder.recipe, "denoiser", plan.identity.model)
    for name, tensor in plan.remainder.tensors.items():
        order = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format  # as `load_pipeline` has it
        _put(denoiser, name, torch.empty_like(tensor, memory_format=order).copy_(tensor))  # strides and all
    quantised = {f"{name}.weight" for name in plan.quant.layers}
    missing = [name for name, tensor in _tensors(denoiser) if tensor.is_meta and name not in quantised]
    if missing:
        raise UserError(f"the plan lacks {missing[0]} of its denoiser: the file is damaged, make the plan again")
    object.__setattr__(denoiser, ORIGIN, plan.identity.weights)
    return denoiser.eval().requires_grad_(False)


def build_pipeline(plan: Plan) -> Any:
    """A pipeline around the plan's skeleton; other parts (text encoder, autoencoder) come from where the model is.

    Raises:
        UserError: as `build_skeleton`, or the other parts cannot be loaded.
    """
    denoiser = build_skeleton(plan)
    assert plan.remainder is not None
    recipe = plan.remainder.recipe
    if recipe.get("others"):
        return load_pipeline(plan.config.model, "cpu", **{_role(recipe): denoiser})
    scheduler = _make(recipe, "scheduler", plan.identity.scheduler)
    kind = _class(recipe.get("pipeline"))
    with _one_line("pipeline"):
        return kind(**{_role(recipe): denoiser, "scheduler": scheduler})


def is_skeleton(denoiser: nn.Module) -> bool:
    """Whether a denoiser was built from a plan, so that there is no full-precision model behind it."""
    return ORIGIN in vars(denoiser)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, the ones that are not saved with the module included."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer by a tensor, without copying it."""
    parent, _, child = name.rpartition(".")
    try:
        owner = module.get_submodule(parent)
    except AttributeError:
        raise UserError(
            f"the plan holds {name}, which its denoiser lacks: the plan is damaged, make it again"
        ) from None
    known = owner._parameters.get(child, owner._buffers.get(child))
    if known is None or (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
        raise UserError(f"the plan's {name} is not as its denoiser has it: the plan is damaged, make it again")
    if child in owner._parameters:
        owner._parameters[child] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[child] = tensor


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _recipe(part: Any) -> dict[str, Any]:
    """Class and configuration of a diffusers part, as JSON."""
    return {"class": _class_name(type(part)), "config": json.loads(part.to_json_string())}


def _class(name: Any) -> Any:
    """The class called `name`, which must be a configurable one of diffusers or of this package.

    Raises:
        UserError: it is of another package, not there, or no such class.
    """
    from diffusers import ConfigMixin

    module, _, kind = str(name).rpartition(".")
    try:
        if module.split(".")[0] not in ("diffusers", "cachequant"):
            raise ImportError(f"{name} is neither of diffusers nor of cachequant")
        found = getattr(importlib.import_module(module), kind)
        if not isinstance(found, type) or not issubclass(found, ConfigMixin):
            raise ImportError(f"{name} is no model, scheduler or pipeline")
        return found
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"the plan's class {name} cannot be had ({error}): install the versions that made the plan"
        ) from None


def _make(recipe: dict[str, Any], part: str, name: str) -> Any:
    """A part of the pipeline from its class and configuration, which must be those that the plan's identity names."""
    with _one_line(part):
        entry = dict(recipe[part])
        kind, config = _class(entry["class"]), dict(entry["config"])
        found = part_name(kind, config)
        if found != name:  # told before anything of forged sizes is built
            raise ValueError(f"it is {found}, the plan was made for {name}")
        return kind.from_config(config)


def _role(recipe: dict[str, Any]) -> str:
    """Which part of the pipeline the denoiser is."""
    role = recipe.get("role")
    if role not in ("unet", "transformer"):
        raise UserError(
            f"the plan's denoiser is the pipeline's {role}, expected unet or transformer: make the plan again"
        )
    return role


@contextmanager
def _one_line(part: str) -> Iterator[None]:
    """diffusers raises many kinds; each means that the plan does not describe such a part."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"the plan's {part} cannot be built ({reason}): the plan is damaged, make it again") from None
