"""The README's commands exist and its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cachequant.cli import build_parser
from cachequant.config import repository_folder

ROOT = repository_folder()
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"(?:^    |`)((?:cachequant|python|make) [^`\n#]+)", TEXT, flags=re.MULTILINE)


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", [c.split() for c in COMMANDS], ids=[c.strip() for c in COMMANDS])
def test_command_exists(command: list[str]) -> None:
    program, first, *rest = command
    if program == "make":
        assert re.search(rf"^{first}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif program == "python":
        assert (ROOT / first).is_file()
        assert all((ROOT / word).is_file() for word in rest if word.startswith("configs/"))
    else:
        assert build_parser().parse_args([first, *rest]).run


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", TEXT)
    assert links and all((ROOT / link).is_file() for link in links)


def test_methods_and_configurations_that_are_named_exist() -> None:
    for path in re.findall(r"configs/[\w/]+\.yaml", TEXT):
        assert (ROOT / path).is_file()


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is printed, with fewer steps and samples."""
    example = re.search(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert example is not None
    small = '"sampler.steps=6", "cache.interval=2", "calibration.samples=2", "calibration.batch_size=2"'
    code = (
        example.group(1)
        .replace('"cache.interval=5"', small)
        .replace("num_inference_steps=100", "num_inference_steps=6")
    )
    assert small in code and "=100" not in code
    code = code.replace('"configs/', f'"{ROOT}/configs/')
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["images"] is not None and names["reference"] is not None
    assert (tmp_path / "plans" / "fashion-n5-w8a8" / "plan.json").is_file()
