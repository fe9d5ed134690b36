"""Reads untrusted JSON: bounded in size and depth, without duplicate keys, control characters or infinite numbers.

JSON has no NaN and no Infinity, although Python writes them by default. They are never written here, and read as None.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitoats.common.errors import InputError, RunError, one_line
from vitoats.common.whole_files import read_text

LARGEST = 2**24  # bytes of a file; label descriptions of 21,000 classes take 2 MB
DEEPEST = 32  # levels of nested lists and objects
LARGEST_NUMBER = 2.0**63
REMEDY = "check the weights and the images"


def to_json(value: Any, **options: Any) -> str:
    """Writes plain values as JSON text; ``options`` are those of ``json.dumps``.

    Raises:
        RunError: a number is NaN or infinite; the message names it.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        names = ", ".join(_not_finite(value, "")) or "a number"
        raise RunError(f"{names} is not finite (NaN or Inf), so there is no result: {REMEDY}") from None


def _not_finite(value: Any, name: str) -> Iterator[str]:
    """The dotted names of the numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield name
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _not_finite(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _not_finite(inner, f"{name}[{i}]")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: the file is missing or damaged, or breaks the rules of this module.
    """
    try:
        return parse_json(read_text(path, LARGEST))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({one_line(error, 100)}): copy or make the folder again") from None


def parse_json(text: str) -> Any:
    """Reads JSON text.

    Raises:
        ValueError: the text is not JSON, or breaks the rules of this module.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _check(value: Any) -> None:
    """Checks depth, texts and numbers, level by level."""
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                if any((c < " " and c not in "\t\n\r") or "\x7f" <= c < "\xa0" for c in item):
                    raise ValueError("a text has control characters")
            elif isinstance(item, int | float) and not abs(item) < LARGEST_NUMBER:
                raise ValueError("a number is too large")
        if not below:
            return
        level = below
    raise ValueError("it is nested too deeply")
