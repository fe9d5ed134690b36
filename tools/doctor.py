"""Checks this installation. See vitoats/cli/doctor.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.doctor import main

if __name__ == "__main__":
    sys.exit(run(main))
