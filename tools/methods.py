"""Lists the compression methods. See vitoats/cli/methods.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.methods import main

if __name__ == "__main__":
    sys.exit(run(main))
