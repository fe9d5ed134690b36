"""Adds evaluation results to the model card of a compressed folder. See vitoats/cli/model_card.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.model_card import main

if __name__ == "__main__":
    sys.exit(run(main))
