"""Uploads a compressed folder to the Hugging Face Hub. See vitoats/cli/push.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.push import main

if __name__ == "__main__":
    sys.exit(run(main))
