"""Checks of plain values that were read from a file: each returns the value, or raises a ValueError that names the fault."""

import math
from collections.abc import Sequence
from typing import Any


def item(values: Any, key: str) -> Any:
    """The value under a key of a JSON object."""
    if not isinstance(values, dict) or key not in values:
        raise ValueError(f"{key} is missing")
    return values[key]


def rows(values: Any, what: str) -> Sequence[Any]:
    """A non-empty array."""
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{what} holds no rows")
    return values


def text(value: Any, what: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is no text")
    return value


def whole(value: Any, what: str, least: int = 0) -> int:
    """A whole number of at least ``least``."""
    if type(value) is not int or value < least:
        raise ValueError(f"{what} is no whole number from {least} on")
    return value


def number(value: Any, what: str, least: float = -math.inf, above: float = -math.inf) -> float:
    """A finite number of at least ``least``, and more than ``above``."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{what} is no number")
    if not (abs(value) < 1e300 and value >= least and value > above):
        raise ValueError(f"{what} is out of range")
    return float(value)
