"""Measures, side by side in one run. See vitoats/cli/benchmark.py."""

import sys

from vitoats.cli.benchmark import main
from vitoats.cli.common import run

if __name__ == "__main__":
    sys.exit(run(main))
