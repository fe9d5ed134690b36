"""Notes what a run reads, as digests by name, so that the run can be repeated on the same inputs.

Whoever opens an input calls ``note``; without ``noting`` around it, nothing is computed. A repeated run is checked right there:
inputs are opened before the work starts.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar

from vitoats.common.errors import InputError

Digests = dict[str, list[str]]  # by name; several where a run reads something in several ways

_expected: ContextVar[Mapping[str, list[str]]] = ContextVar("expected")
_found: ContextVar[Digests | None] = ContextVar("found", default=None)


@contextlib.contextmanager
def noting(expected: Mapping[str, list[str]]) -> Iterator[Digests]:
    """Collects the digests that are noted within it.

    Args:
        expected: those of an earlier run, by name; inputs of other names are not checked.
    """
    found: Digests = {}
    tokens = _expected.set(expected), _found.set(found)
    try:
        yield found
    finally:
        _expected.reset(tokens[0])
        _found.reset(tokens[1])


def note(digests: Callable[[], Mapping[str, str]]) -> None:
    """Notes inputs.

    Args:
        digests: computes their digests by name.

    Raises:
        InputError: some differ from those of the run that is repeated; the message names all of these.
    """
    found = _found.get()
    if found is None:
        return
    expected, now = _expected.get(), digests()
    if changed := [name for name, digest in now.items() if digest not in expected.get(name, [digest])]:
        raise InputError(f"not the same as in the first run: {', '.join(changed)}; put those back, or run the command anew")
    for name, digest in now.items():
        if digest not in found.setdefault(name, []):
            found[name].append(digest)
