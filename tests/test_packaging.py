"""requirements.txt, pyproject.toml and environment.yaml say the same."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def parse(lines: list[str]) -> dict[str, SpecifierSet]:
    """Map each requirement's normalised name to its specifiers; a name may occur once."""
    requirements = [Requirement(line) for line in lines]
    names = [canonicalize_name(requirement.name) for requirement in requirements]
    assert len(names) == len(set(names)), f"a name occurs twice in {names}"
    return dict(zip(names, (requirement.specifier for requirement in requirements), strict=True))


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pinned_lines() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in (line.split("#")[0].strip() for line in lines) if line]


@pytest.fixture(scope="module")
def environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yaml").read_text(encoding="utf-8"))


def test_requirements_equal_the_dependencies_but_for_the_torch_pin(project, pinned_lines):
    declared = parse(project["dependencies"])
    pinned = parse(pinned_lines)
    assert set(pinned) == set(declared)
    for name in sorted(set(pinned) - {"torch"}):
        assert pinned[name] == declared[name], name


def test_torch_is_pinned_within_the_declared_range(project, pinned_lines):
    (pin,) = parse(pinned_lines)["torch"]
    assert pin.operator == "=="
    assert parse(project["dependencies"])["torch"].contains(pin.version)


def test_environment_installs_the_requirements(project, pinned_lines, environment):
    assert environment["name"] == project["name"]
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip_section,) = (item for item in environment["dependencies"] if isinstance(item, dict))
    assert f"python{project['requires-python']}" in conda
    assert "pip" in conda
    assert pip_section == {"pip": pinned_lines}


def test_extras(project):
    extras = {name: set(parse(lines)) for name, lines in project["optional-dependencies"].items()}
    assert extras["eval"] == {"torchvision", "open-clip-torch", "torch-fidelity"}
    assert extras["dev"] >= {"pytest", "hypothesis", "pytest-timeout", "ruff", "mypy"}


def test_torchvision_is_declared_in_the_eval_extra_only(project, pinned_lines, environment):
    extras = project["optional-dependencies"]
    declared_in = [name for name, lines in extras.items() if "torchvision" in parse(lines)]
    assert declared_in == ["eval"]
    assert "torchvision" not in parse(project["dependencies"])
    assert "torchvision" not in parse(pinned_lines)
    assert "torchvision" not in str(environment)


def test_console_script(project):
    assert project["scripts"] == {"cachequant": "cachequant.cli:main"}
