"""Trains a linear head on a frozen backbone. See vitoats/cli/train_linear_probe.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.train_linear_probe import main

if __name__ == "__main__":
    sys.exit(run(main))
