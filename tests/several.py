"""Starts a command in several processes with torchrun, for the tests of what they share."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}


def torchrun(processes: int, *argv: object, cache: Path, nodes: tuple[str, ...] = ("--standalone",)) -> subprocess.Popen:
    """Starts a script in so many processes; with one on the only node, without torchrun."""
    several = ["-m", "torch.distributed.run", *nodes, "--nproc-per-node", str(processes)]
    several = several if processes > 1 or nodes != ("--standalone",) else []
    return subprocess.Popen(
        [sys.executable, *several, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(cache),
    )


def finished(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    """What a process wrote on stdout and stderr, once it has ended with this status."""
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == status, stderr
    return stdout, stderr
