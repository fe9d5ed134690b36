"""Compresses a vision transformer with calibration images and writes a folder. See vitoats/cli/compress.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.compress import main

if __name__ == "__main__":
    sys.exit(run(main))
