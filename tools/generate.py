"""Continues a text with a language model in ONNX. See vitoats/cli/generate.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.generate import main

if __name__ == "__main__":
    sys.exit(run(main))
