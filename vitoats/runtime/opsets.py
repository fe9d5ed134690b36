"""Which version of our operators a file imports, read from its bytes: the base install has no package onnx.

An ONNX file is a protobuf message, a sequence of fields with a number, a type and a value. Only the imported operator sets are
read here; the graph is skipped.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

from vitoats.format.operator import DOMAIN

OPSET_IMPORT = 8  # a field of ModelProto; the fields of its value are
OPSET_DOMAIN, OPSET_VERSION = 1, 2
NUMBER, BYTES = 0, 2  # types of fields
FIXED = {1: 8, 5: 4}  # and those of fixed size, in bytes


def domain_version(path: Path) -> int:
    """The version of our operators that an ONNX file imports; 0 if it imports none, or is no ONNX file."""
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _domain_version(content)
        except (ValueError, IndexError):  # an empty file, or no protobuf
            return 0


def _domain_version(model: mmap.mmap | bytes) -> int:
    for field, value in _fields(model):
        if field == OPSET_IMPORT and isinstance(value, slice):
            opset = model[value]
            found = dict(_fields(opset))
            domain, version = found.get(OPSET_DOMAIN), found.get(OPSET_VERSION)
            if isinstance(domain, slice) and isinstance(version, int) and opset[domain] == DOMAIN.encode():
                return version
    return 0


def _fields(message: mmap.mmap | bytes) -> Iterator[tuple[int, int | slice]]:
    """The fields of a message in order: their number, and their value, or where it is.

    Raises:
        ValueError, IndexError: it is no message.
    """
    position, end = 0, len(message)
    while position < end:
        key, position = _number(message, position)
        field, kind = divmod(key, 8)
        if kind == NUMBER:
            value, position = _number(message, position)
            yield field, value
            continue
        if kind == BYTES:
            size, position = _number(message, position)
        elif kind in FIXED:
            size = FIXED[kind]
        else:
            raise ValueError(f"there is no type {kind}")
        if position + size > end:
            raise ValueError("the message is cut off")
        yield field, slice(position, position + size)
        position += size


def _number(message: mmap.mmap | bytes, position: int) -> tuple[int, int]:
    """The number at a position, seven bits a byte, lowest first, and the position after it."""
    number, shift = 0, 0
    while shift < 64:
        byte = message[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
        shift += 7
    raise ValueError("a number has more than 64 bits")
