"""Compares methods on a language model. See vitoats/cli/compare_lm.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.compare_lm import main

if __name__ == "__main__":
    sys.exit(run(main))
