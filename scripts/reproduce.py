"""One of the paper's tables, measured, beside the paper's figures with the difference.

    python scripts/reproduce.py --table cifar --miniature
    python scripts/reproduce.py --table imagenet --ref VIRTUAL_imagenet256_labeled.npz --weights weights --devices 8

Calibrates, samples and judges every row; a second call goes on where the first one stopped. Writes table.txt, table.csv,
table.json and quality.png into --out. The tables are data: configs/tables/*.yaml.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cachequant.cli import guarded
from cachequant.evaluation.tables import table_names
from cachequant.pipeline.reproduce import CommandFailed, reproduce
from cachequant.pipeline.table_recipe import Options


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, choices=table_names())
    parser.add_argument("--miniature", action="store_true", help="on the trained miniatures: offline, other distances")
    parser.add_argument("--ref", type=Path, help="reference of FID and others, as of `cachequant evaluate`")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder of the metrics' networks")
    parser.add_argument("--count", type=int, metavar="N", help="images a row, default the paper's; miniatures 1,000")
    parser.add_argument("--rows", default="", metavar="A,B", help="only these rows")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every row")
    parser.add_argument("--out", type=Path, help="folder, default runs/tables/TABLE or TABLE-miniature")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--devices", type=int, metavar="N", help="workers, default 1")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a table and print it: the exit status."""
    args = parse(argv)
    name = f"{args.table}-miniature" if args.miniature else args.table
    options = Options(
        args.out or Path("runs") / "tables" / name,
        args.miniature,
        args.ref,
        args.count,
        tuple(args.set),
        tuple(row for row in args.rows.split(",") if row),
        args.weights,
        args.device,
        args.devices,
    )

    def action() -> None:
        comparisons = reproduce(args.table, options)
        print("\n\n".join(comparison.text() for comparison in comparisons))
        print(f"\nwrote {options.out}/table.txt, table.csv, table.json, quality.png")

    try:
        return guarded(action)
    except CommandFailed as error:
        return error.status


if __name__ == "__main__":
    sys.exit(main())
