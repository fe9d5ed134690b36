"""Measures the perplexity of a language model on text. See vitoats/cli/eval_perplexity.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.eval_perplexity import main

if __name__ == "__main__":
    sys.exit(run(main))
