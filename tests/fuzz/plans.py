"""Mutated plan folders, read and sampled from as a user would."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cachequant.cli import main
from cachequant.plan import TENSOR_FILES
from cachequant.storage import content_hash, file_hash, load_json
from tests.fuzz.sandbox import Ending, run
from tests.fuzz.values import PATHS, hostile, mutate_bytes, mutate_tree
from tests.fuzz.yamls import BUDGET, SMALL

METHODS = {"paper": "quant.weight_bits=8", "best": "quant.weight_bits=4"}
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.int32)
COMMANDS = (
    ["inspect", "plan"], ["sample", "plan", "out"], ["sample", "plan", "out"], ["sample", "plan", "out", "--full"],
    ["sample", "plan", "out", "--set", "backend=simulated"], ["report", "plan", "--out", "out/page.html", "--count", "1"],
)  # fmt: skip
NAMES = (
    "../../escape",
    "",
    "x",
    "layers..0",
    "__metadata__",
    "layers.x.widths",
    "cache.steps",
    "a" * 4000,
    "operands.x.zero_point",
)
CLASSES = (
    "os.system", "builtins.eval", "cachequant.cli.main", "diffusers.utils.logging.os.system", "cachequant.nothing", "", "x",
    "diffusers.DDIMScheduler", "diffusers.models.attention_processor.Attention", "cachequant.plan.Plan", "diffusers..x",
    "diffusers.AutoencoderKL", "diffusers.DDIMPipeline", "cachequant.config.Path",
)  # fmt: skip


def make_bases(model: Path, folder: Path) -> list[Path]:
    """One plan of each method: 8 bit weights with attention operands, 4 bit with forecasts."""
    config = str(Path(__file__).resolve().parents[2] / "configs" / "fashion.yaml")
    made = []
    for method, bits in METHODS.items():
        settings = [
            word for item in (*SMALL, bits, f"method={method}", f"model.path={model}") for word in ("--set", item)
        ]
        ending = run(lambda: main(["calibrate", config, method, *settings]), folder, [folder])  # noqa: B023  # run at once
        assert ending.status == 0, ending.errors
        made.append(folder / method)
    return made


def seal(folder: Path) -> None:
    """Make the record fit its files again, as a person who forges a plan would."""
    path = folder / "plan.json"
    record = json.loads(path.read_text())
    if isinstance(record, dict):
        record.pop("checksum", None)
        if isinstance(record.get("files"), dict):
            record["files"] = {name: file_hash(folder / name) for name in TENSOR_FILES}
        record = json.loads(json.dumps(record))
        record["checksum"] = content_hash(record)
    path.write_text(json.dumps(record))


def damage_file(draw: random.Random, folder: Path, other: Path) -> str:
    """A file of the folder is not what it was, and nothing hides it."""
    name = draw.choice(("plan.json", *TENSOR_FILES))
    path, kind = (
        folder / name,
        draw.choice(("bytes", "bytes", "bytes", "gone", "empty", "other", "folder", "link", "loop", "device", "deep")),
    )
    if kind == "bytes":
        content, done = mutate_bytes(draw, path.read_bytes())
        path.write_bytes(content)
        return f"{name}: {done}"
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "deep":
        path.write_text("[" * 10**5)
    elif kind == "other":
        shutil.copy(other / name, path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.symlink_to({"link": "/etc/passwd", "loop": name, "device": "/dev/zero"}[kind])
    return f"{name}: {kind}"


def edit_record(draw: random.Random, folder: Path, other: Path) -> str:
    """A value of plan.json is another."""
    path = folder / "plan.json"
    record = json.loads(path.read_text())
    done = mutate_tree(draw, record)
    path.write_text(json.dumps(record))
    return done


def edit_recipe(draw: random.Random, folder: Path, other: Path) -> str:
    """The denoiser, scheduler or pipeline of plan.json is of a hostile class or configuration."""
    path = folder / "plan.json"
    record = json.loads(path.read_text())
    recipe = record["recipe"]
    kind = draw.choice(("class", "class", "config", "role", "size"))
    part = draw.choice(("denoiser", "scheduler"))
    if kind == "class":
        name = draw.choice(CLASSES)
        if draw.random() < 0.3:
            recipe["pipeline"] = name
        else:
            recipe[part]["class"] = name
        done = f"class {name}"
    elif kind == "size":
        key = draw.choice(
            ("block_out_channels", "layers_per_block", "sample_size", "in_channels", "attention_head_dim")
        )
        size = draw.choice((10**6, 2**33, 0, -8))
        recipe["denoiser"]["config"][key] = [size] * 2 if key == "block_out_channels" else size
        done = f"{key} {size}"
    elif kind == "role":
        recipe[draw.choice(("role", "others"))] = draw.choice((hostile(draw), "scheduler", "unet", ["vae"]))
        done = "role"
    else:
        done = mutate_tree(draw, recipe)
    path.write_text(json.dumps(record))
    return f"recipe: {done}"


def edit_paths(draw: random.Random, folder: Path, other: Path) -> str:
    """The configuration inside plan.json points elsewhere."""
    path = folder / "plan.json"
    record = json.loads(path.read_text())
    section, key = draw.choice(
        (("model", "path"), ("model", "name"), ("sampler", "prompts"), (None, "output"), (None, "method"))
    )
    owner = record["config"][section] if section else record["config"]
    owner[key] = draw.choice(PATHS)
    path.write_text(json.dumps(record))
    return f"{key} is {owner[key][:40]!r}"


def edit_tensors(draw: random.Random, folder: Path, other: Path) -> str:
    """A tensor has another name, type, shape or content."""
    path = folder / draw.choice([name for name in TENSOR_FILES if len(load_file(folder / name))])
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    kind = draw.choice(("rename", "drop", "type", "shape", "shape", "value", "header"))
    if kind == "header":
        return f"{path.name}: {forge_header(draw, path)}"
    tensor = tensors.pop(name)
    if kind == "rename":
        tensors[draw.choice((*NAMES, f"{name}x", name[:-1], name.replace(".", "/"), name.swapcase()))] = tensor
    elif kind != "drop":
        made: dict[str, Callable[[random.Random, Tensor], Tensor]] = {
            "type": _retyped,
            "shape": _reshaped,
            "value": _revalued,
        }
        tensors[name] = made[kind](draw, tensor)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
    return f"{path.name}: {kind} of {name}"


def _retyped(draw: random.Random, tensor: Tensor) -> Tensor:
    return tensor.to(draw.choice(DTYPES))


def _reshaped(draw: random.Random, tensor: Tensor) -> Tensor:
    shapes: tuple[Callable[[], Tensor], ...] = (
        lambda: tensor.flatten(), lambda: tensor[None], lambda: tensor[..., None], lambda: tensor.flatten()[:-1],
        lambda: tensor.new_zeros(0), lambda: torch.cat([tensor.flatten()] * 3), lambda: tensor.transpose(0, -1),
        lambda: tensor[: len(tensor) // 2], lambda: torch.cat([tensor, tensor]), lambda: tensor.flatten()[0],
    )  # fmt: skip
    try:
        return draw.choice(shapes)()
    except (IndexError, TypeError, RuntimeError):  # a scalar has no such shape
        return tensor[None]


def _revalued(draw: random.Random, tensor: Tensor) -> Tensor:
    filled = tensor.clone()
    if tensor.is_floating_point():
        return filled.fill_(draw.choice((float("nan"), float("inf"), -1.0, 0.0, 1e38, 1e-45)))
    value = draw.choice((0, 1, -1, 127, 255, 2**31 - 1, -(2**31)))
    return filled.fill_(value % 256 if tensor.dtype == torch.uint8 else value)


def forge_header(draw: random.Random, path: Path) -> str:
    """The table of a safetensors file says what is not there: shapes, types, places or lengths."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    name = draw.choice([key for key in table if key != "__metadata__"])
    entry, kind = table[name], draw.choice(("shape", "type", "place", "length", "meta"))
    if kind == "shape":
        entry["shape"] = draw.choice(([2**40], [2**62, 4], [-1], [], [0], [1] * 70, "x", [1.5], [10**30]))
    elif kind == "type":
        entry["dtype"] = draw.choice(("F64", "I64", "BOOL", "F8_E4M3", "X", "", None, 5))
    elif kind == "place":
        entry["data_offsets"] = draw.choice(([0, 2**62], [2**62, 0], [-1, 4], [0, 0], [4], "x", [0, 1]))
    elif kind == "meta":
        table["__metadata__"] = draw.choice(({"a": "b"}, {"a": 1}, "x", ["y"], None))
    header = json.dumps(table).encode()
    size = draw.choice((2**63, 0, len(header) - 1, len(header) + 1, 2**40)) if kind == "length" else len(header)
    path.write_bytes(struct.pack("<Q", size) + header + content[8 + length :])
    return f"header's {kind} of {name}"


FORGERIES = (edit_record, edit_record, edit_recipe, edit_paths, edit_tensors, edit_tensors, edit_tensors)


def mutate(seed: int, bases: list[Path], folder: Path) -> tuple[str, bool]:
    """The plan of a seed in `folder`: what is wrong with it, and whether its hashes were made to fit."""
    draw = random.Random(f"plan {seed}")
    chosen = draw.randrange(len(bases))
    shutil.copytree(bases[chosen], folder)
    other, forged = bases[chosen - 1], draw.random() < 0.7
    change = draw.choice(FORGERIES) if forged else draw.choice((damage_file, damage_file, edit_record, edit_tensors))
    done = change(draw, folder, other)
    if forged:
        try:
            seal(folder)
        except (OSError, ValueError, RecursionError):  # numbers that JSON has no name for
            forged = False
    return done, forged


def is_long(folder: Path) -> bool:
    """Whether the plan asks for more images than the time limit allows."""
    try:
        config = load_json(folder / "plan.json")["config"]
        return bool(config["sampler"]["steps"] * config["sample"]["count"] > BUDGET)
    except Exception:  # it is not a plan, so it has no right to take long
        return False


def check(seed: int, bases: list[Path], folder: Path) -> tuple[Ending, str | None, str]:
    """Use the mutant of a seed in an empty folder: its ending, what is wrong with that (None: nothing), and the mutation."""
    done, forged = mutate(seed, bases, folder / "plan")
    command = COMMANDS[seed % len(COMMANDS)]
    if command[0] != "report":
        command = [*command, "--json", "out/found.json"]
    ending = run(lambda: main(command), folder, [folder / "out"])
    problem = ending.problem()
    if problem is None and ending.stopped and not is_long(folder / "plan"):
        problem = "hangs"
    if problem is None and ending.status == 0 and not forged and not _same(folder / "plan", bases):
        problem = "a damaged plan was used"
    return ending, problem, f"{' '.join(command[:1])}, {'forged ' if forged else ''}{done}"


def _same(folder: Path, bases: list[Path]) -> bool:
    """Whether a plan is one of the bases after all: only white space was damaged."""
    files = ("plan.json", *TENSOR_FILES)

    def read(place: Path) -> list[Any]:
        return [load_json(place / "plan.json"), *(file_hash(place / name) for name in files[1:])]

    return read(folder) in [read(base) for base in bases]
