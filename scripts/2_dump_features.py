"""Stage 2 of 6: statistics of true against reused features, streamed while sampling; no feature map is stored.

python scripts/2_dump_features.py configs/fashion.yaml [--set KEY=VALUE]
"""

import sys

from cachequant.cli import stage_main

if __name__ == "__main__":
    sys.exit(stage_main(2))
