"""Loads folders in a process that watches itself: what is opened for writing, contacted or started while a folder loads.

    python -m tests.loading.hostile NAME...     prints one line of JSON for each

Run with an environment that sends home, caches and the Hub somewhere harmless.
"""

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

WATCHED = (
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "urllib.Request", "subprocess.Popen",
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link",
    "os.chmod", "os.truncate", "shutil.copyfile", "shutil.move", "shutil.rmtree", "ctypes.dlopen", "pickle.find_class",
)  # fmt: skip
SEEN: list[str] | None = None


def watch(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook; it notes, and lets pass."""
    if SEEN is None:
        return
    writes = event == "open" and ((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(str(args[1])) & set("wax+"))
    if writes or event in WATCHED:
        SEEN.append(f"{event} {args!r:.200}")


def report(name: str) -> dict[str, Any]:
    """Loads one model: how it ended, what was seen, how long it took and the most memory this process had so far, in MB."""
    global SEEN
    from vitoats.loading.load import load_model

    SEEN, start = [], time.monotonic()
    try:
        load_model(name)
        ended = "loaded"
    except BaseException as error:
        ended = f"{type(error).__name__}: {error}"
    seen, SEEN = SEEN, None
    peak = _most_memory()
    return {"name": name, "ended": ended, "seen": seen, "seconds": time.monotonic() - start, "peak": peak}


def _most_memory() -> int:
    """The most resident memory of this process so far, in MB; on Linux without that of the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main(names: list[str]) -> None:
    """Loads them one after another."""
    import torch

    import vitoats.loading.load  # noqa: F401

    torch.set_num_threads(1)
    with contextlib.suppress(Exception):
        torch.empty(1).numpy()
    sys.addaudithook(watch)
    for name in names:
        print(json.dumps(report(name)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
