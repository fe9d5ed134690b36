"""Top-1 and top-5 accuracy of a model, a folder or an ONNX file. See vitoats/cli/eval_imagenet.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.eval_imagenet import main

if __name__ == "__main__":
    sys.exit(run(main))
