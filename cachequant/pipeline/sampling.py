"""Stage 6 at scale: any number of workers fill one folder of shards, and may be killed and started again at any moment.

Every image's noise comes from its own seed on the CPU, so it is bit-identical whatever the workers and batches. A worker
draws whole shards; with one batch size and one kind of device the images are bit-identical too, whatever the number of
workers. Another batch size may round differently inside the kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor
from tqdm import tqdm

from cachequant.config import RunConfig
from cachequant.errors import UserError
from cachequant.evaluation.grid import image_grid, save_image
from cachequant.models.loading import Generator
from cachequant.models.prompts import read_prompts
from cachequant.pipeline.workers import Items, finish, predict
from cachequant.shards import Shard, ShardSet
from cachequant.storage import content_hash, load_json, save_json

Draw = Callable[[list[int]], Tensor]
"""Seeds -> images [B, C, H, W] in [0, 1]."""
SHOWN = 16
"""Images in grid.png."""


class ShardSampler(lightning.LightningModule):
    """Each worker draws every so-many-th shard of those that are missing when it starts.

    Args:
        begin: makes the folder ready; called in the first worker while the others wait.
        join: the folder and how to draw; called in every worker then.
        batch_size: images at once.
    """

    def __init__(self, begin: Callable[[], object], join: Callable[[], tuple[ShardSet, Draw]], batch_size: int) -> None:
        super().__init__()
        self._begin, self._join, self.batch_size = begin, join, batch_size
        self.prepare_data_per_node = False
        self._bar: Any = None
        self.drawn, self.began = 0, 0.0

    def prepare_data(self) -> None:
        """In the first worker of all, before `setup`."""
        self._begin()

    def setup(self, stage: str) -> None:
        """All workers agree on what is missing, which the first one looked up before any of them writes."""
        self.shards, self._draw = self._join()
        names = [shard.name for shard in self.shards.pending()] if self.trainer.is_global_zero else None
        names = self.trainer.strategy.broadcast(names)
        by_name = {shard.name: shard for shard in self.shards.shards()}
        self.drawn = sum(by_name[name].count for name in names)
        self._mine = [by_name[name] for name in names[self.trainer.global_rank :: self.trainer.world_size]]

    def predict_dataloader(self) -> Items:
        """Numbers of this worker's shards; the clock runs from here on, where all workers are ready."""
        self.began = time.perf_counter()
        total = sum(shard.count for shard in self._mine)
        self._bar = tqdm(total=total, desc="6 sample", unit="image", leave=False, disable=_hidden(self.trainer))
        return Items(range(len(self._mine)))

    def predict_step(self, number: int) -> int:
        """Draw one shard and file it."""
        shard = self._mine[number]
        images = torch.cat([self._batch(shard, i) for i in range(0, shard.count, self.batch_size)])
        self.shards.write(shard, images)
        return shard.count

    def _batch(self, shard: Shard, start: int) -> Tensor:
        images = self._draw(shard.seeds[start : start + self.batch_size])
        self._bar.update(len(images))
        return images

    def on_predict_end(self) -> None:
        """Nothing is left on the screen."""
        self._bar.close()


@dataclass(frozen=True)
class Sampled:
    """A finished folder.

    Attributes:
        shards: all its images.
        drawn: how many of them this call drew.
        seconds: how long all workers together were at it, by the clock.
    """

    shards: ShardSet
    drawn: int
    seconds: float


def fill(trainer: lightning.Trainer, sampler: ShardSampler) -> float:
    """Run a sampler in every worker, until no shard is missing: seconds from the first image to the last worker's end.

    The first worker then leaves grid.png, the manifest in order, and seconds.json with what the calls that came to their
    end drew, and how long that took by the clock.

    Raises:
        UserError: shards are missing although every worker is done (another program changed the folder).
    """
    predict(trainer, sampler)
    finish(trainer)
    seconds = time.perf_counter() - sampler.began
    if trainer.is_global_zero:
        missing = sampler.shards.pending()
        if missing:
            raise UserError(f"{sampler.shards.folder} still lacks {missing[0].name}: run the same command again")
        _conclude(sampler.shards, sampler.drawn, seconds)
    return seconds


def _conclude(shards: ShardSet, drawn: int, seconds: float) -> None:
    shards.tidy()
    images = shards.images(SHOWN).float() / 255
    save_image(image_grid({"samples": images}), shards.folder / "grid.png")
    path = shards.folder / "seconds.json"
    before = load_json(path) if path.is_file() else {"drawn": 0, "seconds": 0.0}
    if drawn or not path.is_file():
        save_json(path, {"drawn": before["drawn"] + drawn, "seconds": before["seconds"] + seconds})


def begin_set(folder: Path, maker: dict[str, Any], config: RunConfig) -> ShardSet:
    """The folder of `sample.count` images from `sample.seed` on, without what a killed worker left half-written."""
    settings = config.sample
    shards = ShardSet.create(folder, maker, settings.seed, settings.count, settings.batch_size)
    for rest in folder.glob(".*.tmp"):
        rest.unlink(missing_ok=True)
    return shards


def sample_pipeline(
    pipe: Any, config: RunConfig, maker: dict[str, Any], folder: Path, trainer: lightning.Trainer
) -> Sampled | None:
    """`sample.count` images of a pipeline as it is, accelerated or not; None in workers other than the first.

    Args:
        pipe: on the trainer's device, with a plan enabled on it or none.
        config: sampler and `sample.*`.
        maker: what tells these images from others, beside the sampler: model, plan.
        folder: where the shards go; what is there already is kept.
        trainer: of `make_trainer`.

    Raises:
        UserError: the folder holds other images, or the pipeline refuses the call.
    """
    prompts = read_prompts(config.sampler.prompts)
    sampler_facts = {**asdict(config.sampler), "prompts": content_hash(list(prompts))}
    pipe.set_progress_bar_config(disable=True)
    sampler = ShardSampler(
        lambda: begin_set(folder, {**maker, "sampler": sampler_facts}, config),
        lambda: (ShardSet.open(folder), Generator(pipe, config.sampler, prompts)),
        config.sample.batch_size,
    )
    seconds = fill(trainer, sampler)
    if not trainer.is_global_zero:
        return None
    return Sampled(sampler.shards, sampler.drawn, seconds)


def _hidden(trainer: lightning.Trainer) -> bool | None:
    """For tqdm: None shows a bar on a terminal only, True never."""
    return None if trainer.is_global_zero else True
