"""Stage 3 of 6: DEC for cache, the per-channel least squares of the reused feature.

python scripts/3_fit_dec_cache.py configs/fashion.yaml [--set KEY=VALUE]
"""

import sys

from cachequant.cli import stage_main

if __name__ == "__main__":
    sys.exit(stage_main(3))
