"""Sampling by several workers: the same noise and the same images as one, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cachequant as cq
from cachequant import shards
from cachequant.cli import main
from cachequant.config import RunConfig, repository_folder
from cachequant.models.loading import Generator
from cachequant.pipeline.sampling import sample_pipeline
from cachequant.pipeline.stages import Stages
from cachequant.pipeline.workers import make_trainer
from cachequant.shards import ShardSet, to_uint8

Configure = Callable[..., RunConfig]


@pytest.fixture
def plan_folder(weights_file: Path, configure: Configure, tmp_path: Path) -> Path:
    """A plan of the toy pipeline, which is beside it."""
    config = configure(f"model.path={weights_file}", "schedule.fallback=false", "sample.count=5")
    pipe = cq.load_pipeline(weights_file, "cpu")
    return cq.calibrate(pipe, config, tmp_path / "stages", quiet=True).save(tmp_path / "plan")


def noise_of(pipe: Any, draw: Callable[[list[int]], Tensor], seeds: list[int], batch_size: int) -> Tensor:
    """x at the first evaluation of every seed: [n, C, H, W]."""
    found: list[Tensor] = []
    forward = type(pipe.unet).forward

    def record(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self is pipe.unet:
            found.append(x.clone())
        return forward(self, x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.unet), "forward", record)
        firsts = []
        for i in range(0, len(seeds), batch_size):
            found.clear()
            draw(seeds[i : i + batch_size])
            firsts.append(found[0])
    return torch.cat(firsts)


def test_noise_is_bit_identical_whatever_the_batch(pipe: Any, configure: Configure) -> None:
    draw = Generator(pipe, configure().sampler)
    seeds = list(range(90_000, 90_007))
    alone = noise_of(pipe, draw, seeds, 1)
    assert all(torch.equal(noise_of(pipe, draw, seeds, size), alone) for size in (2, 3, 7))
    assert len({tuple(x.flatten().tolist()) for x in alone}) == 7


def test_images_are_those_of_their_seeds(plan_folder: Path, weights_file: Path, tmp_path: Path) -> None:
    """Against one call of the enabled pipeline a seed; and the batch size changes nothing but rounding."""
    plan = cq.Plan.load(plan_folder)
    sets = []
    for batch_size in (1, 2, 5):
        plan.config.sample.batch_size = batch_size
        pipe = cq.enable(cq.load_pipeline(weights_file, "cpu"), plan)
        made = sample_pipeline(pipe, plan.config, {}, tmp_path / str(batch_size), make_trainer("cpu"))
        assert made is not None
        sets.append(made.shards.images())
    pipe = cq.enable(cq.load_pipeline(weights_file, "cpu"), plan)
    draw = Generator(pipe, plan.config.sampler)
    alone = torch.cat([draw([seed]) for seed in range(90_000, 90_005)])
    assert torch.equal(sets[0], to_uint8(alone).expand_as(sets[0]))
    for images in sets[1:]:
        assert (images.int() - sets[0].int()).abs().max() <= 1


def test_the_untouched_model_starts_from_the_same_noise(plan_folder: Path, weights_file: Path, tmp_path: Path) -> None:
    assert main(["sample", str(plan_folder), str(tmp_path / "full"), "--full", "--device", "cpu"]) == 0
    plan, pipe = cq.Plan.load(plan_folder), cq.load_pipeline(weights_file, "cpu")
    expected = Generator(pipe, plan.config.sampler)(list(range(90_000, 90_005)))
    made = ShardSet.open(tmp_path / "full").images()
    assert (made.int() - to_uint8(expected).int()).abs().max() <= 1
    quick = sample_pipeline(cq.enable(pipe, plan), plan.config, {}, tmp_path / "quick", make_trainer("cpu"))
    assert quick is not None and not torch.equal(quick.shards.images(), made)


def test_a_finished_folder_is_left_alone_and_more_is_refused(
    plan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "sample",
        str(plan_folder),
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "note.json"),
    ]
    assert main(command) == 0
    note = json.loads((tmp_path / "note.json").read_text())
    assert set(note) == {"images", "count", "drawn", "seconds"} and note["count"] == note["drawn"] == 5
    shard = next((tmp_path / "out").glob("*.safetensors"))
    before = shard.stat().st_mtime_ns
    assert main(command) == 0 and shard.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "note.json").read_text())["drawn"] == 0
    capsys.readouterr()
    assert main([*command, "--count", "6"]) == 2
    assert capsys.readouterr().err.startswith("error: ") and shard.stat().st_mtime_ns == before


def test_stage_six_leaves_the_pipeline_as_it_was(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    from cachequant.pipeline.context import Context

    context = Context.of(pipe, configure("schedule.fallback=false"))
    samples, _ = Stages.at(context, tmp_path, quiet=True).samples()
    assert samples.count == 2 and (samples.folder / "grid.png").is_file()
    assert cq.api.find(pipe) is None  # type: ignore[attr-defined]
    plan, _ = Stages.at(context, tmp_path, quiet=True).plan()
    expected = Generator(cq.enable(pipe, plan), context.config.sampler)([90_000, 90_001])
    assert torch.equal(samples.images(), to_uint8(expected).expand_as(samples.images()))


def command_of(plan_folder: Path, out: Path, *options: str) -> list[str]:
    """`cachequant sample` of 100 images; with `small_shards` in 50 shards."""
    return ["sample", str(plan_folder), str(out), "--device", "cpu", "--count", "100", *options]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images a shard, in this process and those forked from it."""
    monkeypatch.setattr(shards, "IMAGES", 2)


def hashes(folder: Path) -> dict[str, str]:
    """File -> sha256, of a complete set."""
    one = ShardSet.open(folder)
    assert one.pending() == []
    assert {path.name for path in folder.glob("*.safetensors")} == {shard.name for shard in one.shards()}
    return {name: entry["sha256"] for name, entry in one.entries().items()}


@pytest.fixture
def alone(small_shards: None, plan_folder: Path, tmp_path: Path) -> dict[str, str]:
    """The shards of one worker that nobody disturbs."""
    assert main(command_of(plan_folder, tmp_path / "alone")) == 0
    found = hashes(tmp_path / "alone")
    assert len(found) == 50
    return found


def fork(command: list[str], log: Path, **variables: str) -> int:
    """The command line in a process of its own, which has imported everything already: its id."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
            os.environ |= variables
            status = main(command)
        finally:
            os._exit(status)
    return pid


def ends(pid: int) -> int:
    """Exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def free_port() -> str:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return str(place.getsockname()[1])


def fork_two(plan_folder: Path, out: Path) -> list[int]:
    """Two workers of one job, as Lightning's launcher starts them."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NODE_RANK": "0"}
    command = command_of(plan_folder, out, "--devices", "2")
    return [fork(command, out.with_suffix(f".{r}.log"), LOCAL_RANK=r, **common) for r in "01"]


def test_workers_killed_at_random_moments_leave_what_the_next_ones_finish(
    alone: dict[str, str], plan_folder: Path, tmp_path: Path
) -> None:
    """kill -9 on one of two workers, then the other, twice in each of four folders: no image lost, doubled or half-written.

    What the first two leave is little work for the next two, who may be done before their moment comes.
    """
    begun = time.monotonic()
    assert [ends(pid) for pid in fork_two(plan_folder, tmp_path / "measured")] == [0, 0]
    seconds, rng, signals = time.monotonic() - begun, random.Random(3), []
    for out in (tmp_path / f"killed-{i}" for i in range(4)):
        for _ in range(2):
            workers = fork_two(plan_folder, out)
            time.sleep(rng.uniform(0.2, 0.6) * seconds)
            rng.shuffle(workers)
            os.kill(workers[0], signal.SIGKILL)
            time.sleep(rng.uniform(0, 0.1) * seconds)
            os.kill(workers[1], signal.SIGKILL)  # as each launcher does to the workers that are left
            signals += [ends(pid) for pid in workers]
        assert [ends(pid) for pid in fork_two(plan_folder, out)] == [0, 0], out.with_suffix(".0.log").read_text()
        assert hashes(out) == alone
        assert not list(out.glob(".*.tmp"))
    assert -signal.SIGKILL in signals


def test_slurm_starts_two_workers(alone: dict[str, str], plan_folder: Path, tmp_path: Path) -> None:
    """Its variables, as srun sets them."""
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "x", "SLURM_JOB_ID": "71"}
    slurm |= {"SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODELIST": "localhost"}
    slurm |= {"MASTER_PORT": free_port()}
    out, log = tmp_path / "slurm", tmp_path / "slurm.log"
    command = command_of(plan_folder, out, "--devices", "2")
    workers = [fork(command, log, SLURM_PROCID=r, SLURM_LOCALID=r, **slurm) for r in "01"]
    assert [ends(pid) for pid in workers] == [0, 0], log.read_text()
    assert hashes(out) == alone


@pytest.mark.slow
def test_lightning_and_torchrun_start_two_workers(alone: dict[str, str], plan_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "sample.py"
    script.write_text(
        "import sys, cachequant.shards as s; s.IMAGES = 2; from cachequant.cli import main; sys.exit(main())"
    )
    path = os.pathsep.join([str(repository_folder()), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    own = [sys.executable, script, *command_of(plan_folder, tmp_path / "own", "--devices", "2")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    torchrun += [script, *command_of(plan_folder, tmp_path / "torchrun")]
    for name, command in (("own", own), ("torchrun", torchrun)):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("images, of which 100 drawn") == 1
        assert hashes(tmp_path / name) == alone, name


def test_a_second_run_in_the_same_folder_is_refused(
    small_shards: None, plan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    first = fork([*command_of(plan_folder, out)[:-1], "100000"], tmp_path / "first.log")
    try:
        while not list(out.glob("*.safetensors")):
            time.sleep(0.02)
        assert main(command_of(plan_folder, out)) == 2
        assert main(["run", str(plan_folder / "absent.yaml"), "--out", str(out)]) == 2
    finally:
        os.kill(first, signal.SIGKILL)
        ends(first)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: {out} is being written by process {first} on") and len(lines) == 2


def test_a_run_of_two_workers_is_the_run_of_one(
    small_shards: None, weights_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All six stages: the first worker makes the plan while the second waits; both draw."""
    options = ["sampler.steps=4", "cache.interval=2", "calibration.samples=2", "calibration.batch_size=2"]
    options += [f"model.path={weights_file}", "schedule.fallback=false", "sample.count=9", "sample.batch_size=2"]
    config = str(repository_folder() / "configs" / "fashion.yaml")
    command = ["run", config, "--device", "cpu", *(word for item in options for word in ("--set", item))]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NODE_RANK": "0"}
    log, two = tmp_path / "two.log", [*command, "--out", str(tmp_path / "two"), "--devices", "2"]
    assert [ends(pid) for pid in [fork(two, log, LOCAL_RANK=r, **common) for r in "01"]] == [0, 0], log.read_text()
    folders = [next((tmp_path / name).glob("6_sample-*")) for name in ("one", "two")]
    assert folders[0].name == folders[1].name and hashes(folders[0]) == hashes(folders[1])
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "two")]) == 0
    assert "6 sample: current" in capsys.readouterr().err
