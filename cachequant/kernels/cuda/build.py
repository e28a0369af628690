"""Compiles the CUTLASS kernels, each to one shared library in a cache folder; needs nvcc and CUTLASS's headers, no GPU.

`python -m cachequant.kernels.cuda.build` builds ahead of time what a card needs; libraries can be carried to a machine
without a compiler. The headers come with the PyPI package nvidia-cutlass (BSD-3-Clause), which is read at build time only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from tqdm import tqdm

from cachequant.errors import UserError
from cachequant.kernels.cuda.variants import VARIANTS, Variant

SOURCES = Path(__file__).with_name("csrc")
FOLDER, HEADERS = "CACHEQUANT_KERNELS", "CACHEQUANT_CUTLASS"
"""Environment variables: where the libraries are kept, and the folder of CUTLASS's sources (with include and tools)."""

INCLUDES = ("include", "tools/util/include")
"""Folders of headers below CUTLASS's sources."""

FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "-shared",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "--expt-relaxed-constexpr",
    "-w",
)


def folder() -> Path:
    """Where the libraries are or will be."""
    given = os.environ.get(FOLDER)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(root) / "cachequant" / "cuda"


def _sources(name: str) -> list[str]:
    """The texts of a source file and of what it includes from the same folder."""
    text = (SOURCES / name).read_text(encoding="utf-8")
    included = [other for other in re.findall(r'#include "([^"]+)"', text) if (SOURCES / other).is_file()]
    return [text, *(part for other in included for part in _sources(other))]


@cache
def _digest(source: str) -> str:
    """Changes with a kernel's sources and flags."""
    return hashlib.sha256("\n".join([*_sources(source), *FLAGS]).encode()).hexdigest()[:12]


def library_path(variant: Variant) -> Path:
    """The file that holds a kernel, named by what it was made from."""
    return folder() / f"{variant.name}-{_digest(variant.source)}.so"


def compiler() -> str | None:
    """nvcc: the one CUDACXX names, on the path, below CUDA_HOME, or in its usual place; None where there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def headers() -> Path | None:
    """The folder of CUTLASS's sources, or None."""
    given = os.environ.get(HEADERS)
    spec = None if given else importlib.util.find_spec("cutlass_library")
    roots = [Path(given)] if given else []
    if spec is not None and spec.submodule_search_locations:
        roots = [Path(place) / "source" for place in spec.submodule_search_locations]
    return next((root for root in roots if (root / INCLUDES[0] / "cutlass" / "cutlass.h").is_file()), None)


def unavailable() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if compiler() is None:
        return "nvcc was not found (install the CUDA toolkit, or name it in CUDACXX)"
    if headers() is None:
        return f"CUTLASS's headers were not found (pip install --no-deps nvidia-cutlass==4.2.0.0, or name them in {HEADERS})"
    return None


def compile_variant(variant: Variant) -> Path:
    """Build one kernel if its library is not there: 30 to 60 seconds and up to 5 GB of memory.

    Raises:
        UserError: nvcc or the headers are missing, or nvcc fails.
    """
    library = library_path(variant)
    if library.is_file():
        return library
    reason, nvcc, cutlass = unavailable(), compiler(), headers()
    if reason is not None or nvcc is None or cutlass is None:
        raise UserError(f"the kernel {variant.name} cannot be built, because {reason}")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        includes = [f"-I{cutlass / part}" for part in INCLUDES]
        command = [
            nvcc,
            *FLAGS,
            variant.target,
            *variant.macros,
            *includes,
            str(SOURCES / variant.source),
            "-o",
            str(made),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line]
            raise UserError(f"nvcc could not build {variant.name}: {(lines or ['no message'])[0][:200]}")
        made.replace(library)
    return library


def build(variants: tuple[Variant, ...], jobs: int = 1) -> None:
    """Build what is missing, `jobs` at a time; each takes up to 5 GB of memory.

    Raises:
        UserError: see `compile_variant`.
    """
    missing = [v for v in variants if not library_path(v).is_file()]
    if missing and (reason := unavailable()) is not None:
        raise UserError(f"{len(missing)} of {len(variants)} kernels are not built, and cannot be, because {reason}")
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(missing), desc="nvcc", unit="kernel") as bar:
        for _ in pool.map(compile_variant, missing):
            bar.update()


def main(arguments: list[str] | None = None) -> int:
    """Build the kernels of one architecture: 90 for Hopper, 80 for Ampere and Ada."""
    parser = argparse.ArgumentParser(prog="python -m cachequant.kernels.cuda.build", description=main.__doc__)
    parser.add_argument("--arch", type=int, choices=(80, 90), action="append", help="may be given twice; default both")
    parser.add_argument(
        "--jobs", type=int, default=1, help="compilers at a time, up to 5 GB of memory each (default 1)"
    )
    given = parser.parse_args(arguments)
    chosen = tuple(v for v in VARIANTS if v.arch in (given.arch or (90, 80)))
    try:
        build(chosen, given.jobs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(chosen)} kernels in {folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
