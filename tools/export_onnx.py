"""Exports a model or a compressed folder to ONNX. See vitoats/cli/export_onnx.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.export_onnx import main

if __name__ == "__main__":
    sys.exit(run(main))
