"""Load diffusers pipelines, name them exactly, and call any of them the same way."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.config import ModelConfig, SamplerConfig, repository_folder
from cachequant.config_values import FAMILIES
from cachequant.errors import UserError
from cachequant.models.adapter import denoiser_of
from cachequant.models.families import with_family_sampler
from cachequant.models.hub import hub_folder, quiet
from cachequant.plan import ModelIdentity
from cachequant.storage import content_hash


def load_pipeline(source: str | Path | ModelConfig, device: str = "auto", **parts: Any) -> Any:
    """A diffusers pipeline in float32.

    Args:
        source: a local diffusers folder (relative ones also from the repository), a hub id, or the `model` section of a
            configuration, which may also name an original checkpoint.
        device: auto, cpu, cuda or cuda:N.
        parts: components of a folder (such as unet=...) that are taken as they are and where they are.

    Raises:
        UserError: it is not there, cannot be read, or the device does not exist.
    """
    target = torch_device(device)
    model = source if isinstance(source, ModelConfig) else ModelConfig(path=str(source))
    if not model.path:
        raise UserError("model.path is empty, expected a diffusers folder, a hub id or an original checkpoint: set it")
    places = _places(model.path)
    file = next((p for p in places if p.is_file()), None)
    with quiet():
        if file is not None:
            if parts:
                raise UserError(
                    f"model.path is the file {file}, expected a diffusers folder to take the other parts from"
                )
            pipe = _from_checkpoint(file, model)
        else:
            folder = next((p for p in places if p.is_dir()), None) or hub_folder(model.path, "pipeline")
            pipe = _from_folder(folder, parts)
            if model.family:
                pipe = with_family_sampler(pipe, model.family)
    if parts:
        return pipe
    if target.type == "cpu":
        denoiser_of(pipe).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster convolutions
    return pipe.to(target)


def _from_checkpoint(file: Path, model: ModelConfig) -> Any:
    """An original checkpoint, converted in memory."""
    from cachequant.models.original.convert import convert

    if not model.family:
        raise UserError(f"model.path is the file {file}, expected its model.family: one of {', '.join(FAMILIES)}")
    config = next((p for p in _places(model.original_config) if p.is_file()), Path(model.original_config or ""))
    return convert(file, model.family, config if model.original_config else None, model.weights).pipe


def _places(name: str | None) -> tuple[Path, ...]:
    """Where a relative path may lie: here, or in the repository."""
    return (Path(name), repository_folder() / name) if name else ()


def _from_folder(folder: Path, parts: dict[str, Any]) -> Any:
    """A folder with model_index.json; its class may be ours. Parts that it was saved without stay None."""
    import diffusers

    from cachequant.models import pipelines

    try:
        index = diffusers.DiffusionPipeline.load_config(folder)
        name = str(index["_class_name"])
        absent: dict[str, Any] = {part: None for part, value in index.items() if value == [None, None]}
        if name == "StableDiffusionPipeline":
            absent |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return getattr(pipelines, name, diffusers.DiffusionPipeline).from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, low_cpu_mem_usage=False, **absent, **parts
        )
    except Exception as error:  # diffusers raises many kinds; each means that the folder holds no usable pipeline
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"no pipeline in {folder}, expected a diffusers folder with model_index.json and all its parts ({reason})"
        ) from None


def torch_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU, else the CPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        available = "cpu" + (", cuda" if torch.cuda.is_available() else "")
        raise UserError(f"device is {name!r}, expected auto or one of {available}: choose one that is here") from None
    return device


def identify(pipe: Any, guidance_scale: float | None) -> ModelIdentity:
    """Exact names of the denoiser, the scheduler and the guidance mode, before anything was replaced in them."""
    denoiser = denoiser_of(pipe)
    scheduler = part_name(type(pipe.scheduler), dict(pipe.scheduler.config))
    guided = guidance_scale is not None and guidance_scale > 1
    model = part_name(type(denoiser), dict(getattr(denoiser, "config", {})))
    origin = vars(denoiser).get("_cachequant_origin")  # built from a plan: its quantised weights are not there to hash
    return ModelIdentity(model, origin or weights_hash(denoiser), scheduler, "cfg" if guided else "none")


def part_name(kind: type, config: dict[str, Any]) -> str:
    """Class of a diffusers part and a hash of its configuration, the same before and after it was saved as JSON."""
    settings = {key: json.dumps(value, default=str) for key, value in config.items() if not key.startswith("_")}
    return f"{kind.__name__}-{content_hash(settings)[:12]}"


def weights_hash(module: nn.Module) -> str:
    """sha256 over the names, shapes and values of all parameters (values as float32)."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{list(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Generator:
    """Calls a pipeline for given seeds: every image's noise comes from its own seed, whatever the batch.

    Attributes:
        pipe: any diffusers text-to-image, class-conditional or unconditional pipeline.
        sampler: steps, eta, guidance and conditioning.
        prompts: cycled over the seeds, for pipelines that take text.
    """

    pipe: Any
    sampler: SamplerConfig
    prompts: tuple[str, ...] = ()

    def __call__(self, seeds: list[int]) -> Tensor:
        """Images [B, C, H, W] in [0, 1], float32 on the CPU."""
        with torch.no_grad():
            images = self.pipe(**self._arguments(seeds)).images
        if isinstance(images, Tensor):
            return images.float().cpu()
        return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous()

    def _arguments(self, seeds: list[int]) -> dict[str, Any]:
        accepted = inspect.signature(type(self.pipe).__call__).parameters
        wanted: dict[str, Any] = {
            "num_inference_steps": self.sampler.steps,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "output_type": "np",
            "eta": self.sampler.eta,
        }
        scale = self.sampler.guidance_scale
        wanted["guidance_scale"] = 1.0 if scale is None else scale  # never the pipeline's own default
        if "prompt" in accepted:
            if not self.prompts:
                raise UserError("this pipeline needs text: set sampler.prompts to a file with one prompt per line")
            if getattr(self.pipe, "tokenizer", True) is None:
                raise UserError("this pipeline was saved without its tokenizer: convert it again with --tokenizer")
            wanted["prompt"] = [self.prompts[seed % len(self.prompts)] for seed in seeds]
        elif "class_labels" in accepted:
            wanted["class_labels"] = class_labels(self.sampler.labels, class_count(self.pipe), seeds)
        else:
            wanted["batch_size"] = len(seeds)
        return {key: value for key, value in wanted.items() if key in accepted}


def class_count(pipe: Any) -> int | None:
    """Number of classes that a class-conditional pipeline knows, without the one that stands for none; None if unknown.

    Names that the pipeline has for its classes (`DiTPipeline.labels`) count before the rows of its embedding: a network
    trained on ten classes may have a thousand rows.
    """
    named = getattr(pipe, "labels", None)
    if isinstance(named, dict) and named:
        return max(named.values()) + 1
    denoiser = denoiser_of(pipe)
    for owner, key in (
        (getattr(pipe, "class_embedder", None), "num_classes"),
        (denoiser, "num_embeds_ada_norm"),
        (denoiser, "num_class_embeds"),
    ):
        count = getattr(getattr(owner, "config", None), key, None)
        if count is not None:
            return int(count)
    return None


def class_labels(labels: list[int] | None, classes: int | None, seeds: list[int]) -> list[int]:
    """A class id for each seed: cycled from a list, else spread over all classes.

    Spread means seed·m mod `classes`, m prime to it and near its golden section: few consecutive seeds lie far apart,
    `classes` consecutive ones are each class once (ImageNet's neighbouring ids are similar animals).

    Raises:
        UserError: an id that the model lacks, or neither a list nor a number of classes.
    """
    if labels:
        wrong = [label for label in labels if label < 0 or (classes is not None and label >= classes)]
        if wrong:
            limit = "at least 0" if classes is None else f"0 to {classes - 1}"
            raise UserError(f"sampler.labels holds class id {wrong[0]}, expected {limit} for this model: correct it")
        return [labels[seed % len(labels)] for seed in seeds]
    if classes is None:
        raise UserError("this pipeline needs class ids: set sampler.labels to a list of them")
    stride = next(m for m in range(max(1, round(0.618 * classes)), 2 * classes + 1) if math.gcd(m, classes) == 1)
    return [seed * stride % classes for seed in seeds]
