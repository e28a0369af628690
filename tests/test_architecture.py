"""The package's structure: layers, cycles, light import, docstrings, annotations, no local paths.

Everything but the light import is read from the sources with ``ast``, so nothing here needs the
optional libraries.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_tree import (
    PACKAGE,
    ROOT,
    Source,
    import_cycle,
    imports,
    layer_of,
    load,
    repository_files,
    unannotated,
    undocumented,
    unmapped,
    upward_imports,
)

# `import cachequant` must load none of these.
HEAVY = ("triton", "diffusers", "transformers", "pytorch_lightning", "matplotlib", "torchvision")

# Installed by the `eval` extra only, so never imported when a module is.
OPTIONAL = ("torchvision", "open_clip", "torch_fidelity")

LOCAL_PATH = re.compile(r"(?<![\w.])/(work|root)/")


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    found = load(ROOT)
    assert found, f"no module under {PACKAGE}/"
    return found


def report(lines: list[str]) -> str:
    return "\n  ".join(["", *lines])


def test_every_module_has_a_layer(sources):
    names = unmapped(sources)
    assert not names, f"add to LAYERS in tests/source_tree.py: {', '.join(names)}"


def test_imports_go_downward(sources):
    wrong = upward_imports(sources)
    assert not wrong, report(wrong)


def test_imports_form_no_cycle(sources):
    cycle = import_cycle(sources)
    assert not cycle, " -> ".join(cycle)


def test_the_eval_extra_is_imported_only_where_it_is_used(sources):
    wrong = [
        f"{source.name}:{line} imports {target}"
        for source in sources.values()
        for target, line in imports(source, set(sources), on_import_only=True)
        if target.split(".")[0] in OPTIONAL
    ]
    assert not wrong, report(wrong)


def test_public_classes_and_functions_have_docstrings(sources):
    missing = undocumented(sources)
    assert not missing, report(missing)


def test_public_functions_are_annotated(sources):
    missing = unannotated(sources)
    assert not missing, report(missing)


def test_importing_the_package_is_light():
    program = f"""
import json, sys
import {PACKAGE}
torch = sys.modules.get("torch")
print(json.dumps({{
    "path": list({PACKAGE}.__path__),
    "heavy": sorted(set({HEAVY!r}) & set(sys.modules)),
    "cuda": torch is not None and torch.cuda.is_initialized(),
}}))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {"path": [str(ROOT / PACKAGE)], "heavy": [], "cuda": False}


def test_no_file_names_a_path_of_one_machine():
    wrong = []
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if LOCAL_PATH.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, report(wrong)


# The checks themselves, each on a small package that breaks its rule.


def write(root: Path, modules: dict[str, str]) -> dict[str, Source]:
    for name, text in {"__init__.py": "", **modules}.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return load(root)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("plan", 0),
        ("quant.affine", 1),
        ("kernels", 2),
        ("kernels.reference", 2),
        ("quant", 3),
        ("quant.layers", 3),
        ("quant.affine_extra", 3),
        ("models.unet", 4),
        ("cli", 5),
        ("cli_report", 5),
        ("demo.data", 5),
        ("__main__", 5),
        ("planner", None),
    ],
)
def test_layer_of(name, layer):
    assert layer_of(f"{PACKAGE}.{name}") == layer


@pytest.mark.parametrize(
    "statement",
    [
        "import cachequant.schedule",
        "from cachequant.schedule import plan",
        "from cachequant import schedule",
        "from . import schedule",
        "from .schedule import plan",
        "def f():\n    from .schedule import plan",
        "from cachequant import make_plan",
    ],
)
def test_upward_imports_are_found(tmp_path, statement):
    found = upward_imports(write(tmp_path, {"plan.py": statement, "schedule.py": ""}))
    assert len(found) == 1, found


def test_downward_imports_and_metadata_pass(tmp_path):
    modules = {
        "plan.py": "import torch\nfrom cachequant import __version__\nfrom .errors import E",
        "errors.py": "",
        "quant/__init__.py": "from .layers import L",
        "quant/affine.py": "from ..plan import P",
        "quant/layers.py": "from . import affine",
    }
    found = write(tmp_path, modules)
    assert unmapped(found) == []
    assert upward_imports(found) == []
    assert import_cycle(found) == []


def test_cycles_are_found(tmp_path):
    pair = {"plan.py": "from . import config", "config.py": "from .plan import P"}
    direct = write(tmp_path / "direct", pair)
    assert set(import_cycle(direct)) == {f"{PACKAGE}.plan", f"{PACKAGE}.config"}
    through_a_package = write(
        tmp_path / "package",
        {
            "correction.py": "from .quant.affine import f",
            "quant/__init__.py": "from .layers import L",
            "quant/affine.py": "",
            "quant/layers.py": "from ..correction import c",
        },
    )
    assert f"{PACKAGE}.quant" in import_cycle(through_a_package)


def test_imports_that_do_not_run_make_no_cycle(tmp_path):
    config = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .plan import P\n"
    config += "def f():\n    from .plan import P\n"
    assert import_cycle(write(tmp_path, {"plan.py": "from . import config", "config.py": config})) == []


def test_missing_docstrings_and_annotations_are_found(tmp_path):
    text = '''
def bare(a, *, b: int = 0, **rest): ...
def full(a: int, *rest: int) -> int:
    """Documented."""
def _private(a): ...
class Thing:
    """Documented."""
    def method(self, x): ...
    @staticmethod
    def static(x: int) -> None: ...
'''
    found = write(tmp_path, {"plan.py": text})
    assert [line.split(" ")[1] for line in undocumented(found)] == ["cachequant.plan.bare"]
    assert [line.split(" ")[1] for line in unannotated(found)] == ["a", "rest", "return", "x", "return"]


@pytest.mark.parametrize(("text", "matches"), [("see {}x", True), ("a{}x", False), ("=..{}x", False)])
def test_local_path_pattern(text, matches):
    for folder in ("work", "root"):
        assert bool(LOCAL_PATH.search(text.format(f"/{folder}/"))) is matches
