"""What every training script shares: options, a time budget, averaged weights, checkpoints, resuming."""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn

from cachequant.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
PROCESS_START = time.perf_counter()


def parser(description: str | None, name: str, steps: int, batch_size: int, lr: float) -> argparse.ArgumentParser:
    """The options common to all training scripts; `name` is the folder under runs/ and assets/."""
    raw = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(description=description, formatter_class=raw)
    result.add_argument("--steps", type=int, default=steps, help="upper limit")
    result.add_argument("--minutes", type=float, default=60.0, help="end this long after the program's start")
    result.add_argument("--batch-size", type=int, default=batch_size)
    result.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    result.add_argument("--warm-up", type=int, default=500, help="steps of learning-rate warm-up")
    result.add_argument("--ema-decay", type=float, default=0.9995)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--compile", action="store_true", help="torch.compile the network")
    result.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    result.add_argument("--start-from", type=Path, help="folder of exported weights to begin with")
    result.add_argument("--checkpoint-every", type=int, default=2000, help="steps; exports too")
    result.add_argument("--run", type=Path, default=REPOSITORY / "runs" / name, help="checkpoints")
    result.add_argument("--out", type=Path, default=REPOSITORY / "assets" / name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result.add_argument("--device", choices=("cuda", "cpu"), default=device)
    return result


class Budget:
    """Share of the steps and minutes that is spent; a resumed run counts what the earlier ones used.

    Args:
        steps: limit, over all runs.
        minutes: limit of this run, from the program's start (imports, data and compilation included).
    """

    def __init__(self, steps: int, minutes: float) -> None:
        self.steps = steps
        self.end = PROCESS_START + 60.0 * minutes
        self.seconds_before = 0.0
        self.begin = time.perf_counter()

    def start(self) -> None:
        """Training begins now."""
        self.begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time so far, that of earlier runs included."""
        return self.seconds_before + time.perf_counter() - self.begin

    def progress(self, step: int) -> float:
        """The larger of both shares after `step` steps, at most 1."""
        limit = self.seconds_before + max(self.end - self.begin, 1e-9)
        return min(1.0, max(step / self.steps, self.seconds / limit))


class Ticks:
    """An endless loader of nothing: the modules draw their own batches."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class Averaged(pl.LightningModule):
    """A network with an exponential moving average of its weights, trained within a budget.

    Subclasses implement `loss`, which draws its own batch from data that lies on the device.

    Args:
        network: what is trained; a ModuleDict where a model has several parts.
        options: of `parser`.
    """

    def __init__(self, network: nn.Module, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options
        self.network = network
        self.ema = copy.deepcopy(network).requires_grad_(False)
        self.budget = Budget(options.steps, options.minutes)

    def loss(self) -> Tensor:
        """The scalar loss of a fresh batch."""
        raise NotImplementedError

    @property
    def compiled(self) -> nn.Module:
        """The part of the network that --compile compiles."""
        return self.network

    def on_train_start(self) -> None:
        torch.manual_seed(self.options.seed + self.global_step)
        self.budget.start()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=self.options.lr, weight_decay=1e-3)

    def on_train_batch_start(self, batch: int, batch_idx: int) -> int | None:
        progress = self.budget.progress(self.global_step)
        if progress >= 1.0:
            self.trainer.should_stop = True
            return -1
        warm_up = min(1.0, (self.global_step + 1) / self.options.warm_up)
        rate = self.options.lr * warm_up * 0.5 * (1.0 + math.cos(math.pi * progress))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate
        return None

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        loss = self.loss()
        self.log("loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: int, batch_idx: int) -> None:
        step = self.global_step
        decay = min(self.options.ema_decay, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.network.parameters()), 1.0 - decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seconds"] = self.budget.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.budget.seconds_before = checkpoint["seconds"]


class Export(Callback):
    """Calls `export` every so many steps, so that a run that is cut short leaves something that loads."""

    def __init__(self, every: int, export: Callable[[], None]) -> None:
        self.every, self.export = every, export

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0:
            self.export()


def warm_up(module: Averaged, options: argparse.Namespace) -> None:
    """Compiles the network where --compile says so, by one loss and its gradient on the device; no weight changes."""
    if options.compile:
        module.compiled.compile()
        module.to(options.device)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            loss = module.loss()
        loss.backward()
        module.zero_grad(set_to_none=True)


def train(module: Averaged, options: argparse.Namespace, export: Callable[[], None]) -> None:
    """Trains to the step or time budget; leaves `last.ckpt` in the run folder and an export of the averaged weights.

    Args:
        module: changed in place.
        options: of `parser`.
        export: writes the averaged weights where they belong.

    Raises:
        UserError: --resume without a checkpoint.
    """
    last = options.run / "last.ckpt"
    if options.resume and not last.is_file():
        raise UserError(f"no checkpoint {last}; expected one for --resume: train without it first")
    trainer = pl.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision=precision(options),
        max_steps=options.steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        callbacks=[
            ModelCheckpoint(
                dirpath=options.run,
                filename="last",
                every_n_train_steps=options.checkpoint_every,
                enable_version_counter=False,
            ),
            Export(options.checkpoint_every, export),
            TQDMProgressBar(refresh_rate=50),
        ],
        logger=False,
        benchmark=options.device == "cuda",
        enable_model_summary=False,
    )
    trainer.fit(module, Ticks(), ckpt_path=last if options.resume else None)
    trainer.save_checkpoint(last)
    export()


def precision(options: argparse.Namespace) -> str:
    """Lightning's name of the precision that a device trains in."""
    return "bf16-mixed" if options.device == "cuda" else "32-true"


def half(network: nn.Module) -> Any:
    """A float16 copy of a network, as it is published."""
    copied = copy.deepcopy(network)
    nn.Module.to(copied, "cpu", torch.float16)  # not diffusers' own `to`, which warns
    return copied.to(memory_format=torch.contiguous_format)


def load_exported(parts: dict[str, nn.Module], folder: Path | None) -> None:
    """Sets each part to the weights of its subfolder of an exported pipeline; nothing without a folder.

    Raises:
        UserError: a part is not there.
    """
    for name, part in parts.items() if folder is not None else ():
        if not (folder / name / "config.json").is_file():
            raise UserError(f"no {name} in {folder}; expected an exported pipeline for --start-from")
        part.load_state_dict(type(part).from_pretrained(folder / name, torch_dtype=torch.float32).state_dict())


def facts(module: Averaged) -> dict[str, Any]:
    """What a model card says of the training."""
    options = module.options
    return {
        "parameters": sum(p.numel() for p in module.ema.parameters()),
        "earlier": earlier_trainings(options.start_from),
        "steps": module.trainer.global_step,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "seed": options.seed,
        "ema_decay": options.ema_decay,
        "minutes": module.budget.seconds / 60.0,
        "hardware": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "torch_version": torch.__version__,
        "precision": precision(options),
    }


def earlier_trainings(folder: Path | None) -> list[dict[str, float]]:
    """Steps and minutes of the trainings that made the weights in `folder`, from its `training.json`; first one first."""
    record = folder / "training.json" if folder else None
    if record is None or not record.is_file():
        return []
    found = json.loads(record.read_text(encoding="utf-8"))
    return [*found.get("earlier", []), {"steps": found["steps"], "minutes": found["minutes"]}]
