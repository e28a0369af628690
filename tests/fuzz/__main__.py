"""`python -m tests.fuzz`: the full counts of mutated files and of runs that are killed, with a progress bar.

python -m tests.fuzz --yaml 1000 --plans 1000 --kills 50 --interrupts 50 --full-disks 50
python -m tests.fuzz --yaml 1 --first 123 --keep      # one case again, its files kept
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a hostile model path that reads like a hub id must not be looked for

from tqdm import tqdm

from tests.fuzz import plans, yamls
from tests.fuzz.interruptions import Interruption
from tests.fuzz.ready import ready_model
from tests.fuzz.sandbox import Ending

Check = Callable[[int, Path], tuple[Ending, str | None, str]]


def warm_up(root: Path) -> tuple[Path, list[Path]]:
    """The toy model, and the plans that are mutated."""
    model = ready_model(root)
    (root / "bases").mkdir()
    return model, plans.make_bases(model, root / "bases")


def campaign(name: str, check: Check, seeds: range, root: Path, keep: bool) -> list[str]:
    """Check every seed in a folder of its own: the failures. A summary of how the cases ended is printed."""
    endings: Counter[str] = Counter()
    failures = []
    for seed in tqdm(seeds, desc=name, disable=None):
        folder = root / f"{name}-{seed}"
        folder.mkdir()
        ending, problem, done = check(seed, folder)
        kind = {0: "correct runs", 2: "one-line errors", 130: "stopped in a long run"}.get(ending.status, "others")
        endings["failures" if problem else kind] += 1
        if problem:
            failures.append(f"{name} {seed} ({done}): {problem}")
            tqdm.write(failures[-1], file=sys.stderr)
        if keep:
            print(f"{name} {seed} ({done}): status {ending.status}\n{ending.output}{ending.errors}{folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{name}: {len(seeds)} cases: " + ", ".join(f"{count} {kind}" for kind, count in endings.most_common()))
    return failures


def main() -> int:
    """Run what is asked for: 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--yaml", type=int, default=0, metavar="N", help="mutated configuration files")
    parser.add_argument("--plans", type=int, default=0, metavar="N", help="mutated plans")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="runs that kill -9 ends at a random moment")
    parser.add_argument("--interrupts", type=int, default=0, metavar="N", help="runs that Ctrl-C ends")
    parser.add_argument(
        "--full-disks", type=int, default=0, metavar="N", help="runs without room, in each file and (as root) on disk"
    )
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="seed of the first case, default 0")
    parser.add_argument("--keep", action="store_true", help="keep and print the folders")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    model, bases = warm_up(root)
    checks: dict[str, tuple[Check, int]] = {
        "yaml": (lambda seed, folder: yamls.check(seed, model, folder), args.yaml),
        "plans": (lambda seed, folder: plans.check(seed, bases, folder), args.plans),
    }
    if args.kills or args.interrupts or args.full_disks:
        (root / "whole").mkdir()
        stop = Interruption(model, root / "whole")
        checks |= {
            "kills": (stop.kill, args.kills),
            "interrupts": (stop.interrupt, args.interrupts),
            "limited files": (stop.limit_files, args.full_disks),
            "full disks": (stop.fill_disk, args.full_disks if os.geteuid() == 0 else 0),
        }
    failures = []
    for name, (check, count) in checks.items():
        if count:
            failures += campaign(name, check, range(args.first, args.first + count), root, args.keep)
    if not args.keep:
        shutil.rmtree(root)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
