"""A few attacks of each kind on each long command; ``python -m tests.attacks`` makes more of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attacks.commands import COMMANDS

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_kills_full_disks_and_second_runs_change_no_byte():
    few = ["--kills", "2", "--disks", "1", "--pairs", "1"]
    process = subprocess.run(
        [sys.executable, "-m", "tests.attacks", *few],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("0 problems") == len(COMMANDS)
