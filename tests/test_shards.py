"""Shards: whole or absent. Writers are killed at random moments; what they leave is read, finished and compared."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cachequant import shards
from cachequant.errors import UserError
from cachequant.lock import writer_lock
from cachequant.shards import Shard, ShardSet, to_uint8

MAKER = {"plan": "a plan", "steps": 3}


def images_of(shard: Shard) -> Tensor:
    """Images that their seeds determine: [count, 3, 8, 8]."""
    each = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in shard.seeds]
    return torch.stack(each)


def fill(one: ShardSet) -> None:
    for shard in one.pending():
        one.write(shard, images_of(shard))


@given(first=st.integers(0, 9**9), count=st.integers(1, 400), size=st.integers(1, 70))
@settings(max_examples=60, deadline=None)
def test_shards_part_the_seeds(first: int, count: int, size: int) -> None:
    parts = ShardSet(Path(), {}, first, count, size).shards()
    assert [seed for shard in parts for seed in shard.seeds] == list(range(first, first + count))
    assert all(shard.count == size for shard in parts[:-1])
    assert sorted(shard.name for shard in parts) == [shard.name for shard in parts]


@pytest.mark.parametrize(("batch", "size"), [(1, 64), (8, 64), (48, 48), (64, 64), (200, 200)])
def test_a_shard_is_a_whole_number_of_batches(tmp_path: Path, batch: int, size: int) -> None:
    assert ShardSet.create(tmp_path, {}, 0, 1000, batch).size == size


def test_images_come_back_rounded_and_in_order(tmp_path: Path) -> None:
    one = ShardSet.create(tmp_path, MAKER, 5, 150, 10)
    fill(one)
    assert one.pending() == []
    assert torch.equal(one.images(), to_uint8(images_of(Shard(5, 150))))
    assert torch.equal(one.images(7), to_uint8(images_of(Shard(5, 7))))
    assert to_uint8(torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 2.0])).tolist() == [0, 0, 1, 255]


def test_a_begun_folder_goes_on_with_any_batch_size_and_refuses_other_images(tmp_path: Path) -> None:
    one = ShardSet.create(tmp_path, MAKER, 5, 150, 10)
    assert ShardSet.create(tmp_path, MAKER, 5, 150, 7).size == one.size == 60
    for maker, first, count, words in (
        ({**MAKER, "plan": "b"}, 5, 150, "of plan a plan, not b"),
        (MAKER, 6, 150, "first 5, not 6"),
        (MAKER, 5, 151, "count 150, not 151"),
    ):
        with pytest.raises(UserError, match=words):
            ShardSet.create(tmp_path, maker, first, count, 10)


def test_what_was_changed_removed_or_never_entered_is_missing(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "IMAGES", 4)
        one = ShardSet.create(tmp_path, MAKER, 0, 20, 4)
    fill(one)
    parts = one.shards()
    path = tmp_path / parts[0].name
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    (tmp_path / parts[1].name).unlink()
    lines = (tmp_path / "manifest.jsonl").read_text().splitlines()
    torn = [line for line in lines if parts[2].name not in line]
    torn[-1] = torn[-1][:40]  # a kill cut the last line, that of parts[4]
    (tmp_path / "manifest.jsonl").write_text("\n".join(torn))
    assert one.pending() == [parts[0], parts[1], parts[2], parts[4]]
    with pytest.raises(UserError, match="was changed"):
        one.load(parts[0])
    fill(one)  # the first new line follows the torn one
    assert one.pending() == [] and torch.equal(one.images(), to_uint8(images_of(Shard(0, 20))))


def test_the_last_of_two_lines_counts(tmp_path: Path) -> None:
    """Two workers that draw one shard (an orphan of a killed job, and its successor) leave one whole shard."""
    one = ShardSet.create(tmp_path, MAKER, 0, 4, 4)
    one.write(one.shards()[0], torch.zeros(4, 1, 2, 2))
    one.write(one.shards()[0], torch.ones(4, 1, 2, 2))
    assert one.pending() == [] and int(one.images().min()) == 255


def _child(folder: Path, rank: int) -> None:
    """A worker of two, until it is done or killed."""
    one = ShardSet.open(folder)
    for shard in one.pending()[rank::2]:
        one.write(shard, images_of(shard))


def _fork(folder: Path, rank: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _child(folder, rank)
        finally:
            os._exit(0)
    return pid


def test_workers_killed_at_random_moments_lose_double_or_halve_nothing(tmp_path: Path) -> None:
    """kill -9 on both of two writing processes, twenty times; what is entered is whole at every moment in between."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "IMAGES", 1)
        one = ShardSet.create(tmp_path, MAKER, 100, 400, 1)
    rng, kills = random.Random(0), 0
    while missing := one.pending():
        for shard in set(one.shards()) - set(missing):
            assert torch.equal(one.load(shard), to_uint8(images_of(shard)))
        workers = [_fork(tmp_path, rank) for rank in (0, 1)]
        for pid in workers if kills < 40 else ():
            time.sleep(rng.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            kills += 1
        for pid in workers:
            os.waitpid(pid, 0)
    assert kills > 4
    assert torch.equal(one.images(), to_uint8(images_of(Shard(100, 400))))
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {shard.name for shard in one.shards()}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"maker": {}, "first": 0, "count": -1, "size": 3}', "\0"])
def test_a_damaged_description_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(UserError, match="damaged"):
        ShardSet.open(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ShardSet.create(tmp_path, MAKER, 0, 4, 4)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left on device"):
        one.write(one.shards()[0], images_of(one.shards()[0]))
    monkeypatch.undo()
    assert one.pending() == one.shards() and not list(tmp_path.glob(".*.tmp"))


def test_a_second_writer_is_refused_until_the_first_ends_or_dies(tmp_path: Path) -> None:
    with writer_lock(tmp_path):
        with (
            pytest.raises(UserError, match=rf"is being written by process {os.getpid()}") as caught,
            writer_lock(tmp_path),
        ):
            pass
        assert "\n" not in str(caught.value)
    pid = os.fork()
    if pid == 0:
        with writer_lock(tmp_path):
            (tmp_path / "held").write_text("")
            time.sleep(60)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"process {pid} "), writer_lock(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with writer_lock(tmp_path):
        pass


def test_a_tidy_manifest_has_a_line_a_shard_in_order_whoever_wrote_them(tmp_path: Path) -> None:
    contents = []
    for name, order in (("forward", 1), ("backward", -1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "IMAGES", 4)
            one = ShardSet.create(tmp_path / name, MAKER, 3, 18, 4)
        for shard in one.shards()[::order]:
            one.write(shard, images_of(shard))
        one.write(one.shards()[1], images_of(one.shards()[1]))
        one.tidy()
        assert one.pending() == []
        contents.append((one.folder / "manifest.jsonl").read_bytes())
    assert contents[0] == contents[1]
    lines = [json.loads(line) for line in contents[0].splitlines()]
    assert [(line["first"], line["count"]) for line in lines] == [(3, 4), (7, 4), (11, 4), (15, 4), (19, 2)]
    assert all(set(line) == {"file", "first", "count", "sha256"} for line in lines)
