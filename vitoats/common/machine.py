"""Facts about this machine: its processor, the cores available to the process, the size of the last-level cache."""

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE = 32 * 2**20  # bytes: the last-level cache of a common desktop or server processor


def processor() -> str:
    """The processor's name and the machine's number of cores, in words."""
    try:
        lines = CPUINFO.read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_level_cache() -> int:
    """Size of the processor's last-level cache in bytes; 32 MiB if the system does not report it."""
    sizes = [int(f.read_text().strip().rstrip("K")) * 1024 for f in CACHES.glob("index*/size")]
    return max(sizes, default=UNKNOWN_CACHE)
