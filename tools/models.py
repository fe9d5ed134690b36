"""Lists models by name. See vitoats/cli/models.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.models import main

if __name__ == "__main__":
    sys.exit(run(main))
