"""`python -m cachequant` is the command line."""

import sys

from cachequant.cli import main

if __name__ == "__main__":
    sys.exit(main())
