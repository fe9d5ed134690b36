"""What a layer method takes and returns, and the table of methods by name.

A method is one file with a frozen config dataclass and one pure function. It is registered under the name users type:

    @register("oats", OATSConfig)
    def oats(weight, second_moment, config): ...
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitoats.errors import InputError


@dataclass(frozen=True)
class Decomposition:
    """W ~ S + U V, for one weight matrix [d_out, d_in].

    Attributes:
        S: [d_out, d_in], the sparse term with explicit zeros.
        U: [d_out, r].
        V: [r, d_in].
        objective: ||(W - S - U V) D||_F^2, D = diag(sqrt(second_moment)).
        relative_error: the root of objective over ||W D||_F^2.
        steps: how many alternating steps were taken.
    """

    S: Tensor
    U: Tensor
    V: Tensor
    objective: float
    relative_error: float
    steps: int


@dataclass(frozen=True)
class Method:
    """A layer solver: ``solve(weight [d_out, d_in], second_moment [d_in], config) -> Decomposition``."""

    name: str
    config: type
    solve: Callable[[Tensor, Tensor, Any], Decomposition]


METHODS: dict[str, Method] = {}


def register(name: str, config: type) -> Callable:
    """Enters a solver into the table of methods."""

    def enter(solve):
        METHODS[name] = Method(name, config, solve)
        return solve

    return enter


def get_method(name: str) -> Method:
    """Looks a method up by name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}: use one of {', '.join(sorted(METHODS))}")
    return METHODS[name]
