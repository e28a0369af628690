"""Prompt lists in their three formats, and what is wrong with a file in one line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from cachequant.config import repository_folder
from cachequant.errors import UserError
from cachequant.models.prompts import read_prompts, refuse_shared_prompts

FOLDER = repository_folder() / "prompts"


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_lines_lose_their_margins_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, "own.txt", "  a fox \n\n a  red\tdog\n")
    assert read_prompts(path) == ("a fox", "a red dog")
    assert read_prompts(None) == ()


def test_a_table_gives_its_prompt_column_with_quotes_as_they_are(tmp_path: Path) -> None:
    rows = ["Prompt\tCategory\tChallenge\tNote", 'a sign that says "Deep"\tArts\tWriting\t', '"quoted\tWorld\tBasic\tx']
    assert read_prompts(write(tmp_path, "parti.tsv", "\n".join(rows))) == ('a sign that says "Deep"', '"quoted')


def test_captions_are_one_for_each_image_in_the_order_of_the_images(tmp_path: Path) -> None:
    made = [(9, 30, "third"), (2, 12, "later"), (2, 7, "first\n"), (5, 1, "second")]
    annotations = [{"image_id": i, "id": n, "caption": c} for i, n, c in made]
    path = write(tmp_path, "captions.json", json.dumps({"annotations": annotations}))
    assert read_prompts(path) == ("first", "second", "third")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "is empty"),
        ("a.tsv", "Text\tCategory\nx\ty\n", "lacks a column named Prompt"),
        ("a.tsv", "", "is empty"),
        ("a.json", "{}", "lacks COCO's"),
        ("a.json", "[1, 2]", "lacks COCO's"),
        ("a.json", '{"annotations": [', "lacks COCO's"),
        ("a.json", '{"annotations": []}', "is empty"),
    ],
)
def test_a_file_that_is_not_what_its_ending_says_is_one_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_prompts(write(tmp_path, name, text))
    assert "\n" not in str(error.value)


def test_missing_and_undecodable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no prompt file absent.tsv: .*prompts/README.md"):
        read_prompts("absent.tsv")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="UTF-8"):
        read_prompts(str(tmp_path / "latin.txt"))


def test_lists_that_share_a_prompt_are_refused() -> None:
    refuse_shared_prompts((), ("a",))
    refuse_shared_prompts(("b",), ("a",))
    with pytest.raises(UserError, match="share 1 prompts such as 'b'"):
        refuse_shared_prompts(("b", "c"), ("a", "b"))


def test_shipped_lists_are_those_of_the_readme() -> None:
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    shipped = sorted(p for p in FOLDER.iterdir() if p.name != "README.md" and p.name in table)
    assert [p.name for p in shipped if p.suffix == ".txt"] == ["calibration.txt"]
    for path in (p for p in shipped if p.suffix == ".txt"):
        row = next(line for line in table.splitlines() if line.startswith(f"| `{path.name}`"))
        assert hashlib.sha256(path.read_bytes()).hexdigest() in row
        prompts = read_prompts(str(path))
        assert f"| {len(prompts)} |" in row and len(set(prompts)) == len(prompts)
