"""Stage 5 of 6: DEC for quantisation on the scales that will be used; with it the plan is complete.

python scripts/5_fit_dec_quant.py configs/fashion.yaml [--set KEY=VALUE]
"""

import sys

from cachequant.cli import stage_main

if __name__ == "__main__":
    sys.exit(stage_main(5))
