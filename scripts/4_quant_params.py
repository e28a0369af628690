"""Stage 4 of 6: integer weights, and a scale and zero point per activation and executed step.

python scripts/4_quant_params.py configs/fashion.yaml [--set KEY=VALUE]
"""

import sys

from cachequant.cli import stage_main

if __name__ == "__main__":
    sys.exit(stage_main(4))
