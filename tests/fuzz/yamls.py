"""Mutated configuration files, run as a user would run them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from cachequant.cli import main
from cachequant.config import config_to_dict, load_config, repository_folder
from tests.fuzz.sandbox import Ending, run
from tests.fuzz.values import PATHS, hostile, mutate_bytes, mutate_tree

SMALL = (
    "sampler.steps=4", "cache.interval=2", "calibration.samples=2", "calibration.batch_size=2", "sample.count=2",
    "sample.batch_size=2", "schedule.fallback=false", "device=cpu",
)  # fmt: skip
PATH_KEYS = (
    ("model", "path"), ("model", "name"), ("model", "original_config"), ("model", "family"), ("sampler", "prompts"),
    ("calibration", "prompts"), ("output",), ("method",), ("device",), ("backend",),
)  # fmt: skip
LINES = (
    "x: !!python/object/apply:os.system ['touch escape']", "x: !!python/name:os.system", "x: ${oc.env:HOME}", "x: ${..}",
    "output: ${output}", "model: *nowhere", "cache: &a [*a]", "sampler: ???", "\tx: 1", "\0", "{", "- 1", ": :", "1: 2",
    "!!binary x", "method: ${oc.decode:${oc.env:PATH}}", "? [a]\n: b", "<<: {cache: {interval: 3}}", "%YAML 9.9\n---",
    "--- 1\n--- 2", "model: ${oc.create:{path: /}}", "null: 3", "[a, b]: c", "cache: {interval: 2, interval: 3}",
    "\ufeffx: 1", "[" * 5000, "x: " + "{a: " * 5000, f"sampler: {'9' * 5000}",
)  # fmt: skip
BUDGET = 40_000
"""Evaluations that fit into the time limit; whoever asks for more may be asked to stop."""


def bomb(levels: int) -> str:
    """Nine aliases of nine aliases of …: a few bytes that stand for 9^levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


def base(draw: random.Random, model: Path) -> dict[str, Any]:
    """A whole configuration of the toy model."""
    method = draw.choice(("naive", "paper", "best", "dps"))
    config = load_config(repository_folder() / "configs" / "fashion.yaml", [*SMALL, f"method={method}"])
    values = config_to_dict(config)
    values["model"]["path"] = str(model)
    return values


def mutant(seed: int, model: Path) -> tuple[bytes, str]:
    """The configuration file of a seed, and what is wrong with it."""
    draw = random.Random(f"yaml {seed}")
    values = base(draw, model)
    kind = draw.choice(("tree", "tree", "tree", "path", "path", "bytes", "bytes", "line", "bomb", "twice"))
    if kind in ("tree", "twice"):
        done = " and ".join(mutate_tree(draw, values) for _ in range(2 if kind == "twice" else 1))
    elif kind == "path":
        *parents, last = draw.choice(PATH_KEYS)
        owner = values[parents[0]] if parents else values
        owner[last] = draw.choice((*PATHS, hostile(draw)))
        done = f"{'.'.join((*parents, last))} is {str(owner[last])[:40]!r}"
    text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
    if kind == "bytes":
        return mutate_bytes(draw, text.encode())
    if kind == "line":
        line, lines = draw.choice(LINES), text.splitlines()
        lines.insert(draw.randrange(len(lines) + 1), line)
        text, done = "\n".join(lines), f"line {line[:30]!r}"
    if kind == "bomb":
        text, done = f"{text}\n{bomb(draw.choice((3, 30)))}\n", "aliases of aliases"
    return text.encode(errors="surrogatepass"), done


def is_long(path: Path) -> bool:
    """Whether a valid configuration asks for more than the time limit allows."""
    try:
        config = load_config(path)
    except Exception:  # it is not valid, so it has no right to take long
        return False
    if config.quant.recon.enabled and config.quant.recon.iterations > 100:  # of every block
        return True
    calibration, steps = config.calibration, config.sampler.steps
    drawn = (
        2 * calibration.samples + (calibration.dec_samples or 0) + (calibration.dps_samples or 0) + config.sample.count
    )
    return steps * drawn > BUDGET


def output_of(path: Path, folder: Path) -> Path | None:
    """The folder inside of `folder` that holds the output folder of a valid configuration, or is it, if there is one."""
    try:
        output, root = (folder / load_config(path).output).resolve(), folder.resolve()
    except Exception:  # it is not valid: nothing should be written at all
        return None
    return root / output.relative_to(root).parts[0] if output != root and output.is_relative_to(root) else None


def check(seed: int, model: Path, folder: Path) -> tuple[Ending, str | None, str]:
    """Run the mutant of a seed in an empty folder: its ending, what is wrong with that (None: nothing), and the mutation."""
    content, done = mutant(seed, model)
    path, out = folder / "config.yaml", folder / "out"
    path.write_bytes(content)
    own = output_of(path, folder) if seed % 2 else None
    target = [] if own else ["--out", str(out)]
    ending = run(lambda: main(["run", str(path), *target]), folder, [own or out])
    problem = ending.problem()
    if problem is None and ending.stopped and not is_long(path):
        problem = "hangs"
    return ending, problem, done
