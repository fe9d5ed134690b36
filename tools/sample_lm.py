"""Writes text that a language model samples. See vitoats/cli/sample_lm.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.sample_lm import main

if __name__ == "__main__":
    sys.exit(run(main))
