"""Benchmarks of products, models, solvers and files. See vitoats/cli/benchmark."""

import sys

from vitoats.cli.benchmark import main
from vitoats.cli.common import run

if __name__ == "__main__":
    sys.exit(run(main))
