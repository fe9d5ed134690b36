"""The commands, one module each, which ``tools/`` and the console command ``vitoats`` call."""

import os

# How often torch's OpenMP threads look for work before they sleep, read when torch is imported. By default they take
# milliseconds, and if another process works at the same time, the thread that they wait for has no core.
SPINS = "2000"

os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
