"""No file of the package runs code that it reads."""

import ast
from pathlib import Path

import pytest

import cachequant


def unpicklers(tree: ast.AST) -> list[str]:
    """What could run code while it reads a file. `torch.load` may only be called, with a literal weights_only=True."""
    modules = {"pickle", "cPickle", "dill", "joblib", "shelve"}
    safe = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in modules]
        elif isinstance(node, ast.ImportFrom):
            taken = {alias.name for alias in node.names} if node.module in ("torch", "numpy") else set()
            found += [str(node.module)] if (node.module or "").split(".")[0] in modules or "load" in taken else []
        elif isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
            unsafe = node.value.id in ("np", "numpy") or (node.value.id == "torch" and id(node) not in safe)
            found += [ast.unparse(node)] if unsafe else []
    return found


def test_nothing_in_the_package_unpickles() -> None:
    for path in Path(cachequant.__file__).parent.rglob("*.py"):
        assert not unpicklers(ast.parse(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("torch.load(path, weights_only=True)", 0),
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("torch.load(path, weights_only=flag)", 1),
        ("read = torch.load", 1),
        ("from torch import load", 1),
        ("np.load(path)", 1),
        ("import pickle", 1),
        ("from dill import loads", 1),
        ("json.load(handle)", 0),
    ],
)
def test_the_search_for_unpicklers_finds_them(source: str, count: int) -> None:
    assert len(unpicklers(ast.parse(source))) == count
