"""Compares compression methods on the same images. See vitoats/cli/compare.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.compare import main

if __name__ == "__main__":
    sys.exit(run(main))
