"""The interface of compression methods, and the tables of layer methods and structural methods by name.

A method is one file with a frozen config dataclass and one pure function. It is registered under the name users type, with
the statistics of the layer's input that it needs (``vitoats.methods.statistics``):

    @register("oats", OATSConfig, needs="diagonal")
    def oats(weight, statistics, config): ...

Every field of a config has a default, and a config has the methods ``budget(d_out, d_in)`` and ``total_compression()``.

A structural method (``vitoats.compression.structural``) scores the heads and neurons of a module instead:

    @register_structural("numerical", NumericalConfig)
    def numerical(weight, statistics, width, config): ...
"""

import hashlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.format.decomposition import Decomposition
from vitoats.methods.statistics import InputStatistics, StatisticsLevel


def measured(
    weight: Tensor,
    statistics: InputStatistics,
    S: Tensor,
    U: Tensor | None = None,
    V: Tensor | None = None,
    steps: int = 1,
) -> Decomposition:
    """Assembles a result: casts it to the weight's dtype and measures its error.

    Args:
        weight: W [d_out, d_in].
        statistics: moments of the layer's input; with H the error is the true one (see ``Decomposition``).
        S: [d_out, d_in].
        U: [d_out, r], or None at rank 0.
        V: [r, d_in], or None at rank 0.
        steps: number of iterations taken.
    """
    S = S.to(weight.dtype)
    U = weight.new_zeros(weight.shape[0], 0) if U is None else U.to(weight.dtype)
    V = weight.new_zeros(0, weight.shape[1]) if V is None else V.to(weight.dtype)
    objective = output_energy((weight - S - U @ V).double(), statistics)
    total = output_energy(weight.double(), statistics)
    return Decomposition(S, U, V, objective, (objective / total) ** 0.5 if total > 0 else 0.0, steps)


def magnitude_of(W: Tensor) -> float:
    """The power of two just above the largest magnitude of W, and 1 if that is 0.

    Solvers in float32 divide W by it, which is exact: squares of weights near zero do not fit into float32.
    """
    return 2.0 ** math.frexp(W.abs().max().item())[1]


def output_energy(E: Tensor, statistics: InputStatistics) -> float:
    """tr(E H E^T), the mean over tokens of ||E x||^2, for E [d_out, d_in]; D^2 replaces H if H is unknown."""
    if statistics.H is None:
        return (E.square() @ statistics.second_moment.to(E)).sum().item()
    energy = (E @ statistics.H.to(E)).mul_(E).sum().item()
    return 0.0 if energy < 0 else energy  # round-off may leave it below 0; NaN stays NaN


def output_error(weight: Tensor, change: Tensor, shift: Tensor | None, statistics: InputStatistics) -> float:
    """The relative error of a layer's output, ||Y' - Y||_F / ||Y - b||_F over all tokens; Y = X W^T + b is the dense layer's.

    Args:
        weight: W [d_out, d_in].
        change: W' - W.
        shift: b' - b [d_out]; None if there is no bias, or if it stays.
        statistics: uncentred moments of X, including H and the mean.
    """
    energy = output_energy(change.double(), statistics)
    if shift is not None:
        energy += (shift.double() * (shift.double() + 2 * statistics.mean_output(change))).sum().item()
    total = output_energy(weight.double(), statistics)
    return (0.0 if energy < 0 else (energy / total) ** 0.5) if total > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a method is best used on a whole model, unless the user says otherwise.

    Attributes:
        target: the reconstruction target of a layer (``vitoats.calibration.targets``).
        refit_bias: whether the bias absorbs the mean of a layer's lost output.
        allocation: how the budget is split over the layers (``vitoats.allocation``).
        calibration_mix: what is mixed in with the user's images (``vitoats.data.synthetic``).
        amp: whether the model runs under torch's autocast to bfloat16; solvers do not.
    """

    target: Literal["block", "sequential", "dense", "residual"] = "block"
    refit_bias: bool = False
    allocation: Literal["uniform", "owl", "sensitivity"] = "uniform"
    calibration_mix: Literal["none", "synthetic", "general", "both"] = "none"
    amp: bool = False

    def __post_init__(self):
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(field.type)
            if choices and value not in choices:
                raise InputError(f"{value!r} is wrong: `{field.name}` takes {', '.join(choices)}")
            if field.type is bool and not isinstance(value, bool):
                raise InputError(f"{value!r} is wrong: `{field.name}` takes True or False")


@dataclass(frozen=True)
class Method:
    """A layer solver: ``solve(weight [d_out, d_in], statistics, config) -> Decomposition``.

    Attributes:
        config: the class of its configs, a frozen dataclass.
        solve: the function.
        needs: the statistics that are collected for it.
        left_dense: maps a layer's role ("attention", "gated MLP", "plain MLP", "other") and a config to the reason why the
            layer stays dense, or to None if it is compressed; by default all layers are compressed.
        recipe: how it is used on a whole model by default.
        digest: SHA-256 of the file of a user's own method, "" for built-in methods.
    """

    config: type
    solve: Callable[[Tensor, InputStatistics, Any], Decomposition]
    needs: StatisticsLevel
    left_dense: Callable[[str, Any], str | None] = lambda _role, _config: None
    recipe: Recipe = Recipe()
    digest: str = ""


METHODS: dict[str, Method] = {}


def register(name: str, config: type, needs: StatisticsLevel, **options: Any) -> Callable:
    """Adds a solver to the table of methods; ``needs`` and ``options`` are the attributes of ``Method``."""

    def enter(solve):
        METHODS[name] = Method(config, solve, needs, **options)
        return solve

    return enter


@dataclass(frozen=True)
class StructuralMethod:
    """A scorer of heads or neurons: ``score(weight [d_out, n * width], statistics, width, config) -> [n]``, lowest go first.

    Attributes:
        config: the class of its configs, a frozen dataclass.
        score: the function.
        recipe: how it is used by default.
        digest: as in ``Method``.
    """

    config: type
    score: Callable[[Tensor, InputStatistics, int, Any], Tensor]
    recipe: Recipe = Recipe()
    digest: str = ""


STRUCTURAL: dict[str, StructuralMethod] = {}


def register_structural(name: str, config: type) -> Callable:
    """Adds a scorer to the table of structural methods."""

    def enter(score):
        STRUCTURAL[name] = StructuralMethod(config, score)
        return score

    return enter


def find_method(name: str) -> "Method | StructuralMethod":
    """Looks up a method of either kind by name.

    Raises:
        InputError: as for ``get_method``.
    """
    return STRUCTURAL[name] if name in STRUCTURAL else get_method(name)


def get_method(name: str) -> Method:
    """Looks up a method by name, or loads a user's own, named ``./file.py:name``.

    Raises:
        InputError: there is no method of that name, or the file is unusable.
    """
    path, colon, inner = name.rpartition(".py:")
    if colon:
        return _load(Path(path + ".py"), inner)
    if name not in METHODS:
        names = ", ".join(sorted(METHODS.keys() | STRUCTURAL.keys()))
        raise InputError(f"unknown method {name!r}: use one of {names}, or ./file.py:name for your own")
    return METHODS[name]


_LOADED: dict[tuple[str, str], dict[str, Method]] = {}  # what each file registers, by path and digest


def _load(path: Path, name: str) -> Method:
    """Runs a user's file and returns what it registers as ``name``; the table of methods is left unchanged."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give `method` ./file.py:name") from None
    key = (str(path.resolve()), digest)
    if key not in _LOADED:
        before = dict(METHODS)
        spec = importlib.util.spec_from_file_location(f"vitoats_method_{digest[:16]}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look up their module
        try:
            spec.loader.exec_module(module)
            _LOADED[key] = {n: replace(m, digest=digest) for n, m in METHODS.items() if m is not before.get(n)}
        except (Exception, SystemExit) as error:
            del sys.modules[spec.name]
            said = " ".join(str(error).split())[:200]
            raise InputError(f"{path} does not run ({type(error).__name__}: {said}): correct the file") from None
        finally:
            METHODS.clear()
            METHODS.update(before)
    found = _LOADED[key]
    if name not in found:
        raise InputError(f"{path} registers no method {name!r}: it has {', '.join(sorted(found)) or 'none'}")
    return found[name]
