"""The package's structure, read from its sources with ``ast``: who imports whom, layers, docstrings, annotations."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "cachequant"

# Patterns of module names below the package. "x" stands for x and everything below it, and of
# several that match a module the most specific (the one with most dots) decides.
LAYERS: dict[int, tuple[str, ...]] = {
    0: ("errors", "types", "config", "config_values", "plan", "storage", "assets", "shards", "lock", "host_memory"),
    1: (
        "schedule",
        "second_order",
        "residual",
        "costs",
        "budget",
        "correction",
        "statistics",
        "quant.affine",
        "quant.search",
    ),
    2: ("kernels",),
    3: ("cache", "quant"),
    4: ("models", "evaluation"),
    5: ("pipeline", "cli*", "api", "__main__", "demo*"),
}


@dataclass(frozen=True)
class Source:
    """One module of the package."""

    name: str  # dotted, from the package: "cachequant.quant.affine"
    path: Path
    is_package: bool
    tree: ast.Module


def load(root: Path) -> dict[str, Source]:
    """Parse every module of the package below root."""
    sources = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        sources[name] = Source(name, path, is_package, tree)
    return sources


def layer_of(name: str) -> int | None:
    """The layer of a module, or None if the map has no pattern for it."""
    below = name.removeprefix(f"{PACKAGE}.")
    matches = [
        (pattern.count("."), layer)
        for layer, patterns in LAYERS.items()
        for pattern in patterns
        if fnmatchcase(below, pattern) or fnmatchcase(below, f"{pattern}.*")
    ]
    return max(matches)[1] if matches else None


def is_type_checking(node: ast.AST) -> bool:
    """Whether a node is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_nodes(tree: ast.AST, *, on_import_only: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """A module's import statements: all, or those that run when the module is imported."""
    if isinstance(tree, ast.Import | ast.ImportFrom):
        yield tree
    elif on_import_only and isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    elif on_import_only and isinstance(tree, ast.If) and is_type_checking(tree):
        for child in tree.orelse:
            yield from import_nodes(child, on_import_only=True)
    else:
        for child in ast.iter_child_nodes(tree):
            yield from import_nodes(child, on_import_only=on_import_only)


def targets(node: ast.Import | ast.ImportFrom, source: Source, known: set[str]) -> Iterator[tuple[str, int]]:
    """The dotted names that an import statement asks for, with the line.

    `from a import b` gives a.b where that is a module of the package, and a otherwise.
    """
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno) for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        parts = source.name.split(".")
        parts = parts[: len(parts) - node.level + source.is_package]
        base = ".".join([*parts, base] if base else parts)
    for alias in node.names:
        full = f"{base}.{alias.name}"
        if base == PACKAGE and full not in known and alias.name.startswith("__"):
            continue  # the package's own metadata, as __version__
        yield (full if full in known else base), node.lineno


def imports(source: Source, known: set[str], *, on_import_only: bool) -> list[tuple[str, int]]:
    """What a module imports, as (dotted name, line)."""
    nodes = import_nodes(source.tree, on_import_only=on_import_only)
    return [target for node in nodes for target in targets(node, source, known)]


def inside(name: str) -> bool:
    """Whether a dotted name is the package or below it."""
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def unmapped(sources: dict[str, Source]) -> list[str]:
    """The modules that the map of layers does not know."""
    return [name for name in sources if name != PACKAGE and layer_of(name) is None]


def upward_imports(sources: dict[str, Source]) -> list[str]:
    """The imports that go up, or through the package's root; those within functions included."""
    wrong = []
    for source in sources.values():
        own = layer_of(source.name)
        if source.name == PACKAGE or own is None:
            continue
        for target, line in imports(source, set(sources), on_import_only=False):
            if not inside(target):
                continue
            where = f"{source.name}:{line} (L{own}) imports {target}"
            if target == PACKAGE:
                wrong.append(f"{where}: name the module that defines it, not the package's root")
            elif (layer := layer_of(target)) is not None and layer > own:
                wrong.append(f"{where} (L{layer})")
    return wrong


def import_cycle(sources: dict[str, Source]) -> list[str]:
    """A cycle among the imports that run when modules are imported, or nothing.

    Importing a.b.c runs a and a.b first, so those count too, unless they hold the importer.
    """
    graph: dict[str, set[str]] = {}
    for source in sources.values():
        graph[source.name] = set()
        for target, _ in imports(source, set(sources), on_import_only=True):
            parts = target.split(".")
            for length in range(1, len(parts) + 1):
                runs = ".".join(parts[:length])
                holds_importer = source.name == runs or source.name.startswith(f"{runs}.")
                if runs in sources and (not holds_importer or (runs == target and runs != source.name)):
                    graph[source.name].add(runs)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def public_members(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """The public classes, functions and methods that statements define, with their dotted names."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not node.name.startswith("_"):
                yield f"{prefix}{node.name}", node
                if isinstance(node, ast.ClassDef):
                    yield from public_members(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            for block in (node.body, node.orelse, getattr(node, "finalbody", [])):
                yield from public_members(block, prefix)
            for handler in getattr(node, "handlers", []):
                yield from public_members(handler.body, prefix)


def undocumented(sources: dict[str, Source]) -> list[str]:
    """The public classes and functions of modules that have no docstring."""
    return [
        f"{source.path.name}:{node.lineno} {source.name}.{name}"
        for source in sources.values()
        for name, node in public_members(source.tree.body)
        if "." not in name and not ast.get_docstring(node)
    ]


def unannotated(sources: dict[str, Source]) -> list[str]:
    """The parameters and returns of public functions and methods that have no annotation."""
    missing = []
    for source in sources.values():
        for name, node in public_members(source.tree.body):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args]
            static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
            if "." in name and not static:
                arguments = arguments[1:]
            arguments += node.args.kwonlyargs
            arguments += [star for star in (node.args.vararg, node.args.kwarg) if star]
            lacking = [argument.arg for argument in arguments if argument.annotation is None]
            lacking += [] if node.returns else ["return"]
            missing += [f"{source.name}.{name}:{node.lineno} {item}" for item in lacking]
    return missing


def repository_files() -> list[Path]:
    """The files that are, or could be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:  # an archive without .git
        ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
        folders = [".git", *(line.strip("/") for line in ignored if line.endswith("/"))]
        paths = [
            path
            for path in ROOT.rglob("*")
            if not any(fnmatchcase(part, f) for part in path.relative_to(ROOT).parts for f in folders)
        ]
    return [path for path in paths if path.is_file()]
