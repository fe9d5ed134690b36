"""Does a recorded run again and compares the results. See vitoats/cli/repeat.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.repeat import main

if __name__ == "__main__":
    sys.exit(run(main))
