"""Stage 1 of 6: full-precision trajectories, distances between features, calibration inputs, and the schedule (DPS).

python scripts/1_calibrate.py configs/fashion.yaml [--set KEY=VALUE]
"""

import sys

from cachequant.cli import stage_main

if __name__ == "__main__":
    sys.exit(stage_main(1))
