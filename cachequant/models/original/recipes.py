"""How the six original checkpoints become pipelines: which networks, from which part of the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cachequant.errors import UserError
from cachequant.models.families import latent_scheduler, pixel_scheduler, plms_scheduler, transformer_scheduler
from cachequant.models.original import text
from cachequant.models.original.dit import HEADS, dit, dit_settings
from cachequant.models.original.first_stage import downsampling, first_stage, kind_of
from cachequant.models.original.keymap import Network
from cachequant.models.original.settings import need
from cachequant.models.original.unet import ddpm_unet, ldm_unet

POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
SCHEDULE = "noise schedule, computed again from the configuration"
LATENT_UNUSED = {
    r"(betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_\w+|posterior_\w+|lvlb_weights|logvar)": SCHEDULE,
    r"first_stage_model\.loss\..+": "losses of the first stage's training",
    "scale_factor": "kept as the first stage's scaling_factor",
    POSITIONS.replace(".", r"\."): "token positions 0, 1, 2, …",
}


@dataclass(frozen=True)
class Recipe:
    """What one checkpoint is made into.

    Attributes:
        networks: to be filled from it.
        assemble: filled networks by component name, the tokenizer and a first stage from elsewhere -> pipeline.
        unused: pattern of whole keys -> why no network needs them.
        notes: what was assumed.
    """

    networks: list[Network]
    assemble: Callable[..., Any]
    unused: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def ddpm_recipe(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Recipe:
    """DDPM on CIFAR-10: one U-Net on pixels."""
    network = ddpm_unet(need(settings, "model"), need(settings, "data.image_size"))
    betas = {
        "beta_start": need(settings, "diffusion.beta_start"),
        "beta_end": need(settings, "diffusion.beta_end"),
        "num_train_timesteps": need(settings, "diffusion.num_diffusion_timesteps"),
    }
    _expect(settings, "diffusion.beta_schedule", "linear")

    def assemble(unet: Any) -> Any:
        from cachequant.models.pipelines import PixelDDIMPipeline

        return PixelDDIMPipeline(unet, pixel_scheduler(**betas))

    return Recipe([network], assemble)


def latent_recipe(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Recipe:
    """Latent diffusion: U-Net, first stage, and a conditioner or none."""
    params = need(settings, "model.params")
    betas = _latent_betas(params, tensors, where)
    scale = float(tensors["scale_factor"]) if "scale_factor" in tensors else float(params.get("scale_factor", 1.0))
    kind = conditioning_of(params)
    stage = first_stage(need(params, "first_stage_config"), "vae" if kind == "text" else "vqvae", scale)
    networks = [ldm_unet(need(params, "unet_config.params"), need(params, "image_size")), stage]
    if kind == "none":
        return Recipe(networks, _unconditional(betas), LATENT_UNUSED)
    options = need(params, "cond_stage_config")
    if kind == "class":
        networks.append(text.class_embedder(options))
        return Recipe(networks, _class_conditional(betas), LATENT_UNUSED)
    sizes, notes = text.text_settings(tensors, options, where), []
    if sizes["hidden_size"] % text.HEAD_WIDTH:
        notes.append(
            f"text encoder: {sizes['num_attention_heads']} attention heads, not told by the weights: "
            "cond_stage_config.params.num_attention_heads in the YAML changes that"
        )
    networks.append(text.text_encoder(sizes))
    return Recipe(networks, _text_conditional(betas), LATENT_UNUSED, notes)


def conditioning_of(params: Mapping[str, Any]) -> str:
    """ "none", "class" or "text" of a latent-diffusion configuration.

    Raises:
        UserError: another conditioner.
    """
    given = params.get("cond_stage_config", "__is_unconditional__")
    target = str(given if isinstance(given, str) else need(given, "target", "cond_stage_config")).rpartition(".")[2]
    known = {"__is_unconditional__": "none", "ClassEmbedder": "class", "FrozenCLIPEmbedder": "text"}
    if target not in known:
        raise UserError(f"cond_stage_config is {target}, expected one of {', '.join(known)}")
    return known[target]


def shape_of(params: Mapping[str, Any]) -> str:
    """What a latent-diffusion configuration describes, as messages name it."""
    stage = need(params, "first_stage_config")
    return f"{kind_of(stage)}-f{downsampling(stage)} first stage, conditioning: {conditioning_of(params)}"


def dit_recipe(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Recipe:
    """DiT: the transformer; its first stage is a published one that the checkpoint does not hold."""
    sizes = dit_settings(tensors, settings, where)
    notes = []
    if "num_heads" not in settings and sizes["num_attention_heads"] * sizes["attention_head_dim"] not in HEADS:
        notes.append(
            f"{sizes['num_attention_heads']} attention heads, not told by the weights: num_heads in a YAML does"
        )

    def assemble(transformer: Any, vae: Any = None) -> Any:
        from diffusers import DiTPipeline

        return DiTPipeline(transformer, vae, transformer_scheduler())

    unused = {"pos_embed": "sine-cosine table of the token positions, computed again"}
    return Recipe([dit(sizes)], assemble, unused, notes)


def _latent_betas(params: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Scheduler arguments; a schedule in the checkpoint must agree with the configuration's."""
    _expect({"beta_schedule": params.get("beta_schedule", "linear")}, "beta_schedule", "linear")
    _expect({"parameterization": params.get("parameterization", "eps")}, "parameterization", "eps")
    betas = {
        "beta_start": need(params, "linear_start"),
        "beta_end": need(params, "linear_end"),
        "num_train_timesteps": params.get("timesteps", 1000),
    }
    stored = tensors.get("betas")
    if stored is not None and not stored.is_meta:
        ends = [round(float(stored[i]), 6) for i in (0, -1)]
        wanted = [betas["beta_start"], betas["beta_end"]]
        if (
            any(abs(a - b) > 1e-5 for a, b in zip(ends, wanted, strict=True))
            or len(stored) != betas["num_train_timesteps"]
        ):
            raise UserError(
                f"{where} was trained with {len(stored)} betas from {ends[0]} to {ends[1]}, the configuration says "
                f"{betas['num_train_timesteps']} from {wanted[0]} to {wanted[1]}: give the YAML of this checkpoint"
            )
    return betas


def _expect(settings: Mapping[str, Any], key: str, value: str) -> None:
    found = need(settings, key)
    if found != value:
        raise UserError(f"the original configuration has {key} {found!r}, expected {value!r}: others are not supported")


def _unconditional(betas: dict[str, Any]) -> Callable[..., Any]:
    def assemble(unet: Any, vqvae: Any) -> Any:
        from diffusers import LDMPipeline

        return LDMPipeline(vqvae, unet, latent_scheduler(**betas))

    return assemble


def _class_conditional(betas: dict[str, Any]) -> Callable[..., Any]:
    def assemble(unet: Any, vqvae: Any, class_embedder: Any) -> Any:
        from cachequant.models.pipelines import ClassConditionalLDMPipeline

        return ClassConditionalLDMPipeline(vqvae, unet, class_embedder, latent_scheduler(**betas))

    return assemble


def _text_conditional(betas: dict[str, Any]) -> Callable[..., Any]:
    def assemble(unet: Any, vae: Any, text_encoder: Any, tokenizer: Any = None) -> Any:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae, text_encoder, tokenizer, unet, plms_scheduler(**betas), None, None, requires_safety_checker=False
        )

    return assemble
