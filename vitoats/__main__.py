"""``python -m vitoats`` is the console command ``vitoats``."""

import sys

from vitoats.cli.main import main

sys.exit(main())
