"""Stage 6 of 6: images of the plan.

python scripts/6_sample.py configs/fashion.yaml [--set KEY=VALUE]
"""

import sys

from cachequant.cli import stage_main

if __name__ == "__main__":
    sys.exit(stage_main(6))
