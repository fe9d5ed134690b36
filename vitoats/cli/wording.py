"""Adapts messages of the library to the command line: arguments become flags.

give `images` a folder         ->  give --data-dir a folder
use `allocation='uniform'`     ->  use --allocation uniform
use `form='dense'`             ->  use --dense
raise it (`damping=0.01`)      ->  raise it (--method-options damping=0.01)
"""

import re

from vitoats.common.errors import ARGUMENT

FLAGS = {"images": "data-dir"}  # flags whose name differs from the argument's
METHOD_OPTIONS = (
    "cut",
    "damping",
    "mask_choice",
    "plain",
    "power",
    "threshold",
)  # named in messages, but without a flag of their own


def in_flags(message: str) -> str:
    """Replaces the arguments in a message by flags."""

    def flag(match: re.Match[str]) -> str:
        name, value = match["name"], (match["value"] or "").strip("'")
        if name == "form":  # each form has a flag
            return f"--{value}"
        if name in METHOD_OPTIONS:
            return f"--method-options {name}={value}" if value else f"{name} in --method-options"
        return " ".join([f"--{FLAGS.get(name, name).replace('_', '-')}", *([value] if value else [])])

    return ARGUMENT.sub(flag, message)
