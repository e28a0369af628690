"""One trainer for everything that runs on several devices: Lightning's predict loop, DDP, torchrun or SLURM."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytorch_lightning as lightning
import torch
from pytorch_lightning.strategies import DDPStrategy

from cachequant.errors import UserError
from cachequant.models.loading import torch_device

PATIENCE = timedelta(days=1)
"""How long a worker that is done waits for the slowest; one that died ends the whole job at once."""

PARENT = "CACHEQUANT_PARENT"


class Items(Iterable[int]):
    """Batches of a predict loop, each an index: a data loader without a length, so that a worker may have none."""

    def __init__(self, items: Sequence[int]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[int]:
        return iter(self._items)


def make_trainer(device: str = "auto", devices: int | None = None, nodes: int | None = None) -> lightning.Trainer:
    """A trainer that only predicts.

    Args:
        device: of `torch_device`.
        devices: workers a node, default 1; under torchrun its own number.
        nodes: machines, default 1; under torchrun its own number.

    Raises:
        UserError: a device that is not here, or a number of devices that cannot be.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0))  # torchrun sets it
    devices = (local or 1) if devices is None else devices
    nodes = (int(os.environ["WORLD_SIZE"]) // local if local else 1) if nodes is None else nodes
    target: Any = torch_device(device)  # its index may be None, whatever its annotation says
    several = devices * nodes > 1
    if devices < 1 or nodes < 1:
        raise UserError(f"--devices {devices} and --nodes {nodes} given, expected 1 or more of both")
    if several and target.index is not None:
        raise UserError(
            f"--device {device} with {devices * nodes} workers, expected cpu, cuda or auto: drop its number"
        )
    if target.type == "cuda" and devices > torch.cuda.device_count():
        raise UserError(f"--devices {devices} given, but this machine has {torch.cuda.device_count()} GPUs: lower it")
    if several:
        _end_with_parent()
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # which devices there are is printed by no one else either
    chosen: Any = [target.index] if target.index is not None else devices
    try:
        return lightning.Trainer(
            accelerator="gpu" if target.type == "cuda" else target.type,
            devices=chosen,
            num_nodes=nodes,
            strategy=DDPStrategy(timeout=PATIENCE) if several else "auto",
            use_distributed_sampler=False,
            inference_mode=False,  # tensors made here may be kept by the pipeline
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{devices} devices on {nodes} nodes cannot be had: {' '.join(str(error).split())[:160]}"
        ) from None


def predict(trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
    """Run a module's predict loop in every worker.

    Raises:
        UserError: the job scheduler started another number of workers than was asked for.
        KeyboardInterrupt: as it came; Lightning would exit.
    """
    with one_line_if_a_worker_is_lost(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning)  # Lightning's own call of torch
        try:
            trainer.predict(module, return_predictions=False)
        except SystemExit:
            raise KeyboardInterrupt from None
        except BaseException as error:
            _end_others(trainer)
            if isinstance(error, ValueError) and "`devices=" in str(error):
                raise UserError(f"workers cannot start: {' '.join(str(error).split())[:160]}") from None
            raise


@contextmanager
def one_line_if_a_worker_is_lost() -> Iterator[None]:
    """Around whatever waits for other workers.

    Raises:
        UserError: another worker ended before its work was done; it has said why.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "Connection closed by peer" in str(error):
            raise UserError(
                "another worker ended early (its own message says why): run the same command again"
            ) from None
        raise


def _end_others(trainer: lightning.Trainer) -> None:
    """This worker has failed: those that it started would wait for it."""
    launcher = getattr(trainer.strategy, "launcher", None)
    if launcher is not None:
        launcher.kill(signal.SIGKILL)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def finish(trainer: lightning.Trainer) -> None:
    """Wait for every worker and take the connections down, so that all of them end in peace."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        with one_line_if_a_worker_is_lost():
            trainer.strategy.barrier("finish")
        torch.distributed.destroy_process_group()


def _end_with_parent() -> None:
    """Let a worker die with the process that started it, instead of waiting for a peer that is gone.

    Lightning's own workers know that process by a variable, as it may be gone before they come here.
    """
    started_by_lightning = "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if "LOCAL_RANK" not in os.environ:
        os.environ[PARENT] = str(os.getpid())  # for those that it will start
        return
    parent = int(os.environ.get(PARENT, os.getppid())) if started_by_lightning else os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def share(count: int, trainer: lightning.Trainer) -> tuple[int, int]:
    """Start and stop of this worker's part of `count` things in a row."""
    rank, world = trainer.global_rank, trainer.world_size
    return count * rank // world, count * (rank + 1) // world
