"""The drawings' names, split, tokeniser and packed file, and the prompt lists drawn from them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cachequant.config import repository_folder
from cachequant.errors import UserError

PROMPTS = repository_folder() / "prompts"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository_folder() / "scripts" / "train"))


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Three sets of forty drawings: each one colour on transparency, of sides 64 or 256."""
    import drawings

    entries = [
        {"name": f"THING {i // 10} {i % 10}", "unified": f"{i:04X}", "image": f"{i:04x}.png", "category": "Objects"}
        for i in range(40)
    ]  # fmt: skip
    entries.append({"name": "A FLAG", "unified": "FFFF", "image": "ffff.png", "category": "Flags"})
    for number, (package, pattern) in enumerate(drawings.SETS.values()):
        for i, entry in enumerate(entries):
            path = tmp_path / package / pattern.format(image=entry["image"], code=entry["unified"].lower())
            path.parent.mkdir(parents=True, exist_ok=True)
            side = 256 if path.suffix == ".webp" else 64
            Image.new("RGBA", (side, side), (5 * i, 100 * number, 0, 255)).save(path, lossless=True)
    (tmp_path / "emoji-datasource-google" / "emoji.json").write_text(json.dumps(entries))
    return tmp_path


def test_packing_keeps_drawings_names_and_the_split(packages: Path, tmp_path: Path) -> None:
    import drawings
    import prepare_drawings

    out = tmp_path / "data" / "drawings.npz"
    prepare_drawings.main(["--packages", str(packages), "--out", str(out), "--prompts", str(tmp_path / "prompts")])
    data = drawings.load_drawings(out)
    assert data.images.shape == (120, 3, 64, 64)
    assert "a flag" not in data.names
    assert data.sets == ("noto",) * 40 + ("twemoji",) * 40 + ("fluent",) * 40
    colours = data.images.float().mean((2, 3))  # [120, 3]
    expected = torch.tensor([[5.0 * i, 100.0 * s, 0.0] for s in range(3) for i in range(40)])
    assert (colours - expected).abs().max() < 4  # WebP is lossy
    for name in set(data.names):
        assert len({bool(data.held_out[i]) for i, other in enumerate(data.names) if other == name}) == 1
    known, new = data.part(held_out=False), data.part(held_out=True)
    assert len(known.names) + len(new.names) == 120 and not set(known.names) & set(new.names)


def test_a_missing_set_is_one_line_with_the_command(tmp_path: Path) -> None:
    import drawings
    import prepare_drawings

    with pytest.raises(UserError, match="npm install"):
        prepare_drawings.main(["--packages", str(tmp_path)])
    with pytest.raises(UserError, match=r"prepare_drawings\.py"):
        drawings.load_drawings(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    ("raw", "name", "concept"),
    [
        ("RED APPLE", "red apple", "red apple"),
        ("FAMILY: MAN, BOY", "family man boy", "family boy"),
        ("man running facing right", "man running facing right", "running"),
        ("woman cook", "woman cook", "cook"),
        ("rescue worker’s helmet", "rescue workers helmet", "rescue workers helmet"),
        ("man", "man", "man"),
    ],
)
def test_names_and_concepts(raw: str, name: str, concept: str) -> None:
    import prepare_drawings

    assert prepare_drawings.clean(raw) == name
    assert prepare_drawings.concept(name) == concept


def test_the_held_out_share_is_a_tenth() -> None:
    import prepare_drawings

    share = sum(prepare_drawings.held_out(f"concept {i}") for i in range(5000)) / 5000
    assert share == pytest.approx(0.1, abs=0.015)


def test_the_tokeniser_reads_any_text_and_comes_back_from_its_folder(tmp_path: Path) -> None:
    import drawings
    from transformers import CLIPTokenizer

    tokenizer = drawings.make_tokenizer(["red apple", "cat face", "ring buoy"])
    texts = ["red apple, noto style", "", "crème brûlée 7", "x" * 100]
    ids = drawings.tokenise(tokenizer, texts)
    assert ids.shape == (4, drawings.MAX_TOKENS)
    assert ids[0, 1:3].tolist() == tokenizer.convert_tokens_to_ids(["red</w>", "apple</w>"])
    assert ids[1].tolist() == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * (drawings.MAX_TOKENS - 1)
    assert tokenizer.unk_token_id not in ids[2, 1 : ids[2].tolist().index(tokenizer.eos_token_id)]
    tokenizer.save_pretrained(tmp_path)
    assert drawings.tokenise(CLIPTokenizer.from_pretrained(tmp_path), texts).equal(ids)


def test_prompt_lists_are_disjoint_and_match_their_hashes() -> None:
    table = (PROMPTS / "README.md").read_text(encoding="utf-8")
    names: list[set[str]] = []
    for path in sorted(PROMPTS.glob("drawings_*.txt")):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in table, path.name
        names.append({line.split(",")[0] for line in path.read_text(encoding="utf-8").splitlines()})
    calibration, evaluation = names
    assert len(calibration) == 512 and len(evaluation) == 256 and not calibration & evaluation


def test_the_judge_keeps_at_most_one_drawing_of_a_name_and_trains_on_the_others() -> None:
    import train_drawings_clip as judge

    names = [f"n{i % 30}" for i in range(90)] + ["alone"]
    kept = judge.kept_drawings(names, seed=0)
    assert len(kept) == 10 and len({names[i] for i in kept}) == 10 and names.index("alone") not in kept
    distinct = list(dict.fromkeys(names))
    rows = judge.rows_of_names(distinct, names, kept)
    assert rows.shape == (31, 3) and not kept & set(rows.flatten().tolist())
    assert all(names[i] == distinct[m] for m, row in enumerate(rows.tolist()) for i in row)
