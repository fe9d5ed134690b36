"""Compresses, exports and measures the embedded model, end to end. See vitoats/cli/demo.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.demo import main

if __name__ == "__main__":
    sys.exit(run(main))
