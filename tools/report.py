"""Writes a report page about compressed models. See vitoats/cli/report.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.report import main

if __name__ == "__main__":
    sys.exit(run(main))
