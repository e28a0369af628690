"""Load diffusers pipelines, name them exactly, and call any of them the same way."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.config import SamplerConfig, repository_folder
from cachequant.errors import UserError
from cachequant.models.adapter import denoiser_of
from cachequant.plan import ModelIdentity
from cachequant.storage import content_hash


def load_pipeline(folder_or_id: str | Path, device: str = "auto", **parts: Any) -> Any:
    """A diffusers pipeline in float32, from a local folder (relative ones also from the repository) or a hub id.

    `parts` (such as unet=...) are taken as they are instead of being loaded.

    Raises:
        UserError: it is not there, cannot be read, or the device does not exist.
    """
    import diffusers

    target = torch_device(device)
    show_bars = diffusers.utils.logging.is_progress_bar_enabled()
    diffusers.utils.logging.disable_progress_bar()
    path = Path(folder_or_id)
    local = next((p for p in (path, repository_folder() / path) if p.is_dir()), None)
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(local or folder_or_id),
            dtype=torch.float32,
            local_files_only=local is not None,
            low_cpu_mem_usage=False,
            **parts,
        )
    except Exception as error:  # diffusers raises many kinds; each means that the model cannot be had
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"no pipeline {folder_or_id}: expected a diffusers folder with model_index.json or a hub id that can be "
            f"reached; download it first ({reason})"
        ) from None
    finally:
        if show_bars:
            diffusers.utils.logging.enable_progress_bar()
    if target.type == "cpu":
        denoiser_of(pipe).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster convolutions
    return pipe.to(target)


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
    config = dict(pipe.scheduler.config)
    settings = {key: str(value) for key, value in config.items() if not key.startswith("_")}
    scheduler = f"{type(pipe.scheduler).__name__}-{content_hash(settings)[:12]}"
    guided = guidance_scale is not None and guidance_scale > 1
    structure = {k: str(v) for k, v in dict(getattr(denoiser, "config", {})).items() if not k.startswith("_")}
    origin = vars(denoiser).get("_cachequant_origin")  # built from a plan: its quantised weights are not there to hash
    weights = origin or content_hash([weights_hash(denoiser), structure])
    return ModelIdentity(type(denoiser).__name__, weights, scheduler, "cfg" if guided else "none")


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
            wanted["prompt"] = [self.prompts[seed % len(self.prompts)] for seed in seeds]
        elif "class_labels" in accepted:
            labels = self.sampler.labels or [0]
            wanted["class_labels"] = [labels[seed % len(labels)] for seed in seeds]
        else:
            wanted["batch_size"] = len(seeds)
        return {key: value for key, value in wanted.items() if key in accepted}


def read_prompts(path: str | None) -> tuple[str, ...]:
    """Non-empty lines of a prompt file; () for None.

    Raises:
        UserError: missing or empty file.
    """
    if path is None:
        return ()
    found = next((p for p in (Path(path), repository_folder() / path) if p.is_file()), None)
    if found is None:
        raise UserError(f"no prompt file {path}: expected a text file with one prompt per line")
    try:
        lines = tuple(line.strip() for line in found.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {path} cannot be read as UTF-8 text ({error}): save it as such") from None
    if not lines:
        raise UserError(f"prompt file {path} is empty: expected one prompt per line")
    return lines
