"""Prompt lists: plain text, PartiPrompts' table, COCO's captions."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from cachequant.config import repository_folder
from cachequant.errors import UserError


def read_prompts(path: str | None) -> tuple[str, ...]:
    """The prompts of a file; () for None.

    `.txt`: one prompt per line, empty lines left out. `.tsv`: the column `Prompt` (PartiPrompts). `.json`: COCO's caption
    annotations, of every image the caption with the lowest id, images by id.

    Raises:
        UserError: missing, empty, or not in the format that its ending promises.
    """
    if path is None:
        return ()
    found = next((p for p in (Path(path), repository_folder() / path) if p.is_file()), None)
    if found is None:
        raise UserError(
            f"no prompt file {path}: expected one prompt per line, a .tsv with a Prompt column or COCO's captions as .json; "
            "prompts/README.md says where lists come from"
        )
    read = {".tsv": _table, ".json": _captions}.get(found.suffix, _lines)
    try:
        prompts = tuple(line for line in (" ".join(p.split()) for p in read(found.read_text(encoding="utf-8"))) if line)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {path} cannot be read as UTF-8 text ({error}): save it as such") from None
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        wanted = (
            "a column named Prompt" if found.suffix == ".tsv" else "COCO's {annotations: [{image_id, id, caption}]}"
        )
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise UserError(f"prompt file {path} lacks {wanted} ({reason}): fetch it again") from None
    if not prompts:
        raise UserError(f"prompt file {path} is empty: expected one prompt per line")
    return prompts


def refuse_shared_prompts(calibration: tuple[str, ...], evaluation: tuple[str, ...]) -> None:
    """Two lists must not meet: a plan is judged on prompts that its calibration has not seen.

    Raises:
        UserError: they share a prompt.
    """
    shared = sorted(set(calibration) & set(evaluation))
    if shared:
        raise UserError(
            f"calibration.prompts and sampler.prompts share {len(shared)} prompts such as {shared[0][:40]!r}, expected "
            "none: take them out of one list"
        )


def _lines(text: str) -> list[str]:
    return text.splitlines()


def _table(text: str) -> list[str]:
    rows = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [row["Prompt"] for row in rows]


def _captions(text: str) -> list[str]:
    chosen: dict[int, tuple[int, str]] = {}
    for entry in json.loads(text)["annotations"]:
        image, caption = int(entry["image_id"]), (int(entry["id"]), str(entry["caption"]))
        chosen[image] = min(caption, chosen.get(image, caption))
    return [chosen[image][1] for image in sorted(chosen)]
