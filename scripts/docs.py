"""Writes the references in assets/docs from the code: command line, configuration keys, plan format.

python scripts/docs.py           # write them
python scripts/docs.py --check   # fail where they are not current
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from typing import Any, get_type_hints

import torch

from cachequant import plan as plan_module
from cachequant import storage
from cachequant.cli import build_parser
from cachequant.config import RunConfig, repository_folder
from cachequant.config_values import FORMATS, allowed_values
from cachequant.plan import TENSOR_FILES, ModelIdentity, Plan
from cachequant.types import (
    ActivationTable,
    AffineMap,
    Correction,
    LayerQuant,
    QuantState,
    Remainder,
    Schedule,
    WeightGrid,
)

FOLDER = repository_folder() / "assets" / "docs"
PER_STEP = "a row for each of the steps: "
FORMAT = f"place in {', '.join(FORMATS)}, absent where it is {FORMATS[0]}: "
TENSORS: dict[str, tuple[tuple[str, type, str, str], ...]] = {
    "correction.safetensors": (
        (r"\.steps$", ActivationTable, "steps", ""),
        (r"\.scale$", AffineMap, "scale", PER_STEP),
        (r"\.shift$", AffineMap, "shift", PER_STEP),
        (r"\.previous$", AffineMap, "previous", PER_STEP),
    ),
    "quant.safetensors": (
        (r"\.steps$", ActivationTable, "steps", ""),
        (r"\.scale$", ActivationTable, "scale", ""),
        (r"\.zero_point$", ActivationTable, "zero_point", ""),
        (r"\.bits$", ActivationTable, "bits", ""),
        (r"\.format$", ActivationTable, "format", FORMAT),
        (
            r"\.weight$",
            WeightGrid,
            "values",
            "of at most 4 bits two to a byte, flattened, the first in the lower half; else ",
        ),
        (r"\.weight_scale$", WeightGrid, "scale", ""),
        (r"\.weight_zero_point$", WeightGrid, "zero_point", ""),
        (r"\.weight_grid$", WeightGrid, "bits", "[1 + dimensions] bits, then the shape of the weight; bits: "),
        (r"\.weight_format$", WeightGrid, "format", FORMAT),
        (r"\.widths$", LayerQuant, "widths", ""),
    ),
    "remainder.safetensors": ((r"", Remainder, "tensors", ""),),  # whose names are the network's own
}
"""File -> pattern of a tensor's name, the attribute that it holds, what its form in the file adds; the first that fits."""
MADE = "<!-- Written by scripts/docs.py from the code: change the docstrings there, then run it. -->"


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 where a page is not current")
    args = parser.parse_args()
    stale = []
    for name, text in pages().items():
        path = FOLDER / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not args.check:
            storage.write_atomically(path, lambda p, text=text: p.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    print(f"{'stale' if args.check else 'written'}: {', '.join(stale) or 'nothing, all are current'}")
    return 1 if args.check and stale else 0


def pages() -> dict[str, str]:
    """File name -> text of every page."""
    return {"command-line.md": command_line(), "configuration.md": configuration(), "plan-format.md": plan_format()}


def command_line() -> str:
    """Every command with its arguments."""
    parser = build_parser()
    lines = ["# The command line", "", MADE, "", parser.description or "", ""]
    lines += ["A user's mistake is one line on stderr and exit status 2; an interrupted command exits with 130.", ""]
    for name, command in commands(parser).items():
        lines += [f"## cachequant {name}", "", f"{_sentence(command.description or '')}.", ""]
        lines += ["| argument | meaning |", "| --- | --- |"]
        lines += [f"| `{_cell(_argument(action))}` | {_cell(_meaning(action))} |" for action in _actions(command)]
        lines += ["", command.epilog or "", ""]
    return _text(lines)


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Name -> parser of every command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def _argument(action: argparse.Action) -> str:
    if not action.option_strings:
        return action.dest
    value = "|".join(action.choices) if action.choices else action.metavar or action.dest.upper()
    return action.option_strings[0] + ("" if action.nargs == 0 else f" {value}")


def _meaning(action: argparse.Action) -> str:
    notes = [action.help or ""]
    if action.required and action.option_strings:
        notes.append("required")
    if action.default not in (None, False, []) and "default" not in notes[0]:
        notes.append(f"default `{action.default}`")
    return "; ".join(note for note in notes if note)


def configuration() -> str:
    """Every key of a YAML, by section."""
    lines = ["# Configuration keys", "", MADE, "", _prose(inspect.getdoc(sys.modules[RunConfig.__module__]) or ""), ""]
    layers = (
        "`configs/_base.yaml`",
        "`configs/method/NAME.yaml`",
        "the model's YAML",
        "its `methods: {NAME: …}`",
        "`--set key=value`",
    )
    lines += [" ← ".join(layers) + ".", ""]
    for prefix, schema in sections(RunConfig):
        lines += [f"## {prefix or 'Top level'}", "", _prose(inspect.getdoc(schema) or ""), ""]
        lines += ["| key | type | default | accepts |", "| --- | --- | --- | --- |"]
        hints = get_type_hints(schema)
        for field in plain_fields(schema):
            key = f"{prefix}.{field.name}" if prefix else field.name
            cells = [f"`{key}`", _type(hints[field.name]), f"`{_yaml(_default(field))}`", allowed_values(key)]
            lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
        lines.append("")
    return _text(lines)


def sections(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, dataclass) of a schema and of everything nested in it."""
    yield prefix, schema
    for field in dataclasses.fields(schema):
        if _is_section(field):
            yield from sections(field.default_factory, f"{prefix}.{field.name}" if prefix else field.name)


def plain_fields(schema: Any) -> list[dataclasses.Field[Any]]:
    """Fields that hold a value, not a section."""
    return [field for field in dataclasses.fields(schema) if not _is_section(field)]


def _is_section(field: dataclasses.Field[Any]) -> bool:
    return dataclasses.is_dataclass(field.default_factory)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _yaml(value: Any) -> str:
    return json.dumps(value)


def _type(hint: Any) -> str:
    names = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join("null" if n is type(None) else n.__name__ if type(n) is type else str(n) for n in names)


def plan_format() -> str:
    """The files of a plan, as an example that uses all of the format has them."""
    with tempfile.TemporaryDirectory() as folder:
        place = example().save(folder)
        record = storage.load_json(place / "plan.json")
        files = {name: storage.load_tensors(place / name) for name in TENSOR_FILES}
    lines = ["# The plan on disk", "", MADE, "", _prose(inspect.getdoc(plan_module) or ""), ""]
    lines += [_prose(Plan.save.__doc__ or ""), "", f"Schema {plan_module.SCHEMA}.", "", "## plan.json", ""]
    lines += ["| key | meaning |", "| --- | --- |"]
    lines += [f"| `{key}` | {_cell(plan_module.RECORD[key])} |" for key in sorted(record)]
    for kind, name in ((ModelIdentity, "identity"), (Schedule, "schedule")):
        lines += ["", f"### {name}", "", "| key | meaning |", "| --- | --- |"]
        lines += [f"| `{key}` | {_cell(attributes(kind)[key])} |" for key in record[name]]
    for name, tensors in files.items():
        lines += ["", f"## {name}", "", "| tensor | type, dimensions | meaning |", "| --- | --- | --- |"]
        lines += tensor_rows(name, tensors)
    return _text(lines)


def example() -> Plan:
    """A plan with all that the format knows: split layers of every format and width, attention operands, corrections."""
    tables = [
        ActivationTable(torch.arange(2, dtype=torch.int32), torch.ones(2), torch.zeros(2), 8, each) for each in FORMATS
    ]
    grids = [
        WeightGrid(torch.zeros(3, 2, 1, 1, dtype=torch.uint8), torch.ones(3), torch.zeros(3), bits, each)
        for bits, each in zip((8, 8, 4), FORMATS, strict=True)
    ]
    layer = LayerQuant(tuple(grids), tuple(tables), (2,) * len(grids))
    maps = {1: AffineMap(torch.ones(2), torch.zeros(2), torch.zeros(2))}
    correction = Correction(maps, {"NAME": {1: AffineMap.identity(3)}}, maps)
    schedule = Schedule((0,), 2, 2, cost=1.0, uniform_cost=1.0)
    quant = QuantState({"NAME": layer}, {"NAME.query": tables[-1]})
    identity = ModelIdentity("", "", "", "none")
    remainder = Remainder({"NAME": torch.zeros(1)}, {"class": ""})
    return Plan(RunConfig(), identity, (1, 0), schedule, correction, quant, {}, remainder)


def tensor_rows(file: str, tensors: dict[str, torch.Tensor]) -> list[str]:
    """One line per kind of tensor, explained by the attribute that it holds.

    Raises:
        KeyError: `TENSORS` does not know one.
    """
    rows: dict[str, str] = {}
    for name, tensor in tensors.items():
        known = next((entry for entry in TENSORS[file] if re.search(entry[0], name)), None)
        if known is None:
            raise KeyError(f"{file} holds {name}, which TENSORS does not explain: add it there")
        _, kind, attribute, more = known
        place = re.sub(r"^(layers\.NAME\.)\d", r"\1SEGMENT", name)
        text = f"{more}{attributes(kind)[attribute]}"
        rows.setdefault(place, f"| `{place}` | {str(tensor.dtype)[6:]}, {tensor.dim()} | {_cell(text)} |")
    return list(rows.values())


def attributes(kind: type) -> dict[str, str]:
    """Attribute -> its text in the `Attributes:` part of a class's docstring."""
    text = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", text, flags=re.MULTILINE)
    return {name: " ".join(value.split()) for name, value in found}


def _prose(text: str) -> str:
    """A docstring as paragraphs, without its sections of arguments and errors."""
    return re.split(r"\n\s*(?:Args|Attributes|Raises|Returns):\n", inspect.cleandoc(text))[0].strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _text(lines: list[str]) -> str:
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
