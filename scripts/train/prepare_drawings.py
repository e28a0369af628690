"""Packs coloured, named drawings of three sets into one file, and draws the prompt lists from their names.

    npm install --prefix .data/packages emoji-datasource-google emoji-datasource-twitter @lobehub/fluent-emoji-3d
    python scripts/train/prepare_drawings.py

Each set draws the same concepts (Unicode's emoji) in its own style. A tenth of the concepts, chosen by a hash of the
concept, is held out in every set. Left out are flags, symbols with writing, and variants of the skin's tone.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from drawings import DATA, HELD_OUT_SHARE, SETS, prompt
from PIL import Image
from tqdm import tqdm

from cachequant.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
INDEX = "emoji-datasource-google/emoji.json"
LEFT_OUT = ("Flags", "Symbols", "Component")
SIDE = 64
CALIBRATION_PROMPTS = 512
EVALUATION_PROMPTS = 256
"""Half of them of training concepts, half of held-out ones (or as many as there are)."""

PERSONS = frozenset({"man", "woman", "men", "women", "person", "people"})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=REPOSITORY / ".data" / "packages" / "node_modules")
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--prompts", type=Path, default=REPOSITORY / "prompts")
    options = parser.parse_args(argv)
    entries = [entry for entry in read_index(options.packages) if entry["category"] not in LEFT_OUT]
    columns: dict[str, list[Any]] = {"names": [], "sets": [], "concepts": [], "held_out": []}
    encoded: list[bytes] = []
    for entry, style, path in tqdm(list(drawings(entries, options.packages)), "packing"):
        name = clean(entry["name"])
        columns["names"].append(name)
        columns["sets"].append(style)
        columns["concepts"].append(concept(name))
        columns["held_out"].append(held_out(concept(name)))
        encoded.append(encode(path))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        options.out,
        webp=np.frombuffer(b"".join(encoded), np.uint8),
        ends=np.cumsum([len(image) for image in encoded]),
        **{key: np.array(values) for key, values in columns.items()},
    )
    known = sorted({n for n, held in zip(columns["names"], columns["held_out"], strict=True) if not held})
    new = sorted({n for n, held in zip(columns["names"], columns["held_out"], strict=True) if held})
    write_prompts(known, new, options.prompts)
    print(f"{len(encoded)} drawings of {len(known) + len(new)} names, {len(new)} held out; wrote {options.out}")


def read_index(packages: Path) -> list[dict[str, Any]]:
    """The entries of the set's index.

    Raises:
        UserError: the package is not there.
    """
    path = packages / INDEX
    if not path.is_file():
        names = " ".join(package for package, _ in SETS.values())
        raise UserError(f"no file {path}; expected the drawings: npm install --prefix {packages.parent} {names}")
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return entries


def drawings(entries: list[dict[str, Any]], packages: Path) -> Iterator[tuple[dict[str, Any], str, Path]]:
    """(entry, style, file) of every drawing that a set has.

    Raises:
        UserError: a set without a single one.
    """
    for style, (package, pattern) in SETS.items():
        found = 0
        for entry in entries:
            path = packages / package / pattern.format(image=entry["image"], code=entry["unified"].lower())
            if path.is_file():
                found += 1
                yield entry, style, path
        if not found:
            raise UserError(f"no drawing in {packages / package}; expected the set: npm install it there")


def clean(name: str) -> str:
    """A name in lower-case words: "FAMILY: MAN, BOY" -> "family man boy"."""
    return " ".join(re.sub(r"[^a-z0-9\- ]", " ", name.lower().replace("’", "").replace("'", "")).split())


def concept(name: str) -> str:
    """What a name shows, whoever it is and wherever they face; equal for "man cook", "woman cook" and "cook"."""
    words = name.replace(" facing right", "").split()
    return " ".join(word for word in words if word not in PERSONS) or name


def held_out(concept_name: str) -> bool:
    """Whether a concept is in the test part; the same on every machine."""
    digest = hashlib.sha256(concept_name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def encode(path: Path) -> bytes:
    """A drawing on white, 64 × 64, as WebP."""
    image = Image.open(path).convert("RGBA")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    sheet = Image.new("RGBA", image.size, "white")
    sheet.alpha_composite(image)
    file = io.BytesIO()
    sheet.convert("RGB").save(file, format="WEBP", quality=95, method=6, use_sharp_yuv=True)
    return file.getvalue()


def write_prompts(known: list[str], new: list[str], folder: Path) -> None:
    """Two lists without a common name: calibration in random styles, evaluation with held-out names at every second line."""
    shuffled = random.Random(0).sample(known, len(known))
    half = min(EVALUATION_PROMPTS // 2, len(new))
    evaluation, calibration = shuffled[:half], shuffled[half : half + CALIBRATION_PROMPTS]
    styles = random.Random(1).choices([None, *SETS], k=len(calibration))
    unseen = random.Random(2).sample(new, half)
    lines = {
        "drawings_calibration.txt": [prompt(name, style) for name, style in zip(calibration, styles, strict=True)],
        "drawings_evaluation.txt": [name for pair in zip(evaluation, unseen, strict=True) for name in pair],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in lines.items():
        (folder / name).write_text("\n".join(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
