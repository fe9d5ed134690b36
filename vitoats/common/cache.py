"""Measurements that are worth keeping between commands: JSON files in ~/.cache/vitoats, or below XDG_CACHE_HOME."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def cached(name: str, read: Callable[[Any], T], make: Callable[[], Any]) -> T:
    """A measurement from the user's cache, or made and put there.

    Args:
        name: of the file, which identifies all that the measurement depends on.
        read: from plain values to the measurement; a file that it fails on is made anew.
        make: measures; gives plain values, for JSON.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitoats" / f"{name}.json"
    try:
        return read(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.writing")
        partial.write_text(json.dumps(made))
        partial.replace(path)
    except OSError:
        pass  # a cache that cannot be written is no reason to stop
    return read(made)
