"""Compresses one layer: from its weights and input statistics to the layer that replaces it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.calibration.targets import OutputError, corrected
from vitoats.common.errors import InputError, RunError
from vitoats.common.finite import is_finite
from vitoats.format import bitmask, factored
from vitoats.format.decomposition import Decomposition
from vitoats.format.factored import Layer
from vitoats.format.int8_layers import Int8Linear, Int8SparseLowRankLinear
from vitoats.format.layers import SparseLowRankLinear
from vitoats.methods.hessian import DAMPING
from vitoats.methods.quantization import Int8Decomposition, quantized
from vitoats.methods.registry import Method, measured, output_error
from vitoats.methods.statistics import InputStatistics
from vitoats.models.blocks import LinearLayer


@dataclass(frozen=True)
class LayerRow:
    """Figures of one compressed layer.

    Attributes:
        name: dotted name in the model.
        d_out: rows of W.
        d_in: columns of W.
        ranks: rank of each part (three for a fused qkv).
        nonzeros: non-zeros of S.
        kept_parameters: nonzeros + sum of r_i (d_i + d_in).
        relative_error: ||Y' - Y||_F / ||Y - b||_F, with Y' the layer's outputs, and Y those of the dense layer, with bias b,
            for the same inputs (``vitoats.methods.registry.output_error``). A layer that makes up for errors of earlier ones
            (``vitoats.calibration.targets``) deliberately has a larger one.
        solver_error: the root of the solver's objective over that of W' = 0 (``Decomposition``), for the weights and moments
            that the solver is given: the weights after the target's correction, and if the bias is refitted, the moments about
            the mean. A method that knows only the diagonal of H ignores correlations between inputs.
        steps: iterations of the solver, the maximum over the parts.
        seconds: time spent in the solver.
    """

    name: str
    d_out: int
    d_in: int
    ranks: tuple[int, ...]
    nonzeros: int
    kept_parameters: int
    relative_error: float
    solver_error: float
    steps: int
    seconds: float

    @classmethod
    def of(cls, values: dict[str, Any]) -> "LayerRow":
        """Reads plain values, as ``asdict`` gives them."""
        return cls(**{**values, "ranks": tuple(values["ranks"])})


def packed_layer(made: tuple[Layer, LayerRow]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A compressed layer and its figures as tensors and plain values."""
    layer, row = made
    return factored.pack(row.name, layer), asdict(row)


def unpacked_layer(tensors: Mapping[str, Tensor], values: dict[str, Any]) -> tuple[Layer, LayerRow]:
    """The reverse of ``packed_layer``, in float32; tensors of other layers are ignored."""
    row = LayerRow.of(values)
    equal = row.d_out // len(row.ranks)
    factors = [tensors.get(f"{row.name}.U.{i}") for i in range(len(row.ranks))]  # none for a dense int8 layer
    heights = [equal if U is None else len(U) for U in factors]
    return factored.unpack(row.name, tensors, list(zip(heights, row.ranks, strict=True)), row.d_in).float(), row


@dataclass(frozen=True)
class LayerProblem:
    """The weights that a solver approximates, and the statistics of their input.

    Attributes:
        weight: [d_out, d_in], float32.
        bias: [d_out].
        heights: of the matrices that the weight stacks; each is solved on its own.
        statistics: moments of the input, on the weight's device.
        refit_bias: whether the bias, which must then exist, absorbs the mean of the lost output.
    """

    weight: Tensor
    bias: Tensor | None
    heights: tuple[int, ...]
    statistics: InputStatistics
    refit_bias: bool

    @cached_property
    def moments(self) -> InputStatistics:
        """The moments that the solver sees: about the mean if the bias is refitted."""
        return self.statistics.centred() if self.refit_bias else self.statistics

    def solve(self, solve: Callable[[Tensor, InputStatistics], Decomposition]) -> list[Decomposition]:
        """Each part's decomposition."""
        return [solve(part, self.moments) for part in self.weight.split(self.heights)]

    def refitted_bias(self, lost: Tensor) -> Tensor:
        """The bias that makes up for the mean output of the missing weights ``lost`` [d_out, d_in]."""
        assert self.bias is not None
        return self.bias + self.statistics.mean_output(lost).to(self.bias)


@torch.inference_mode()
def compress_layer(
    layer: LinearLayer,
    statistics: InputStatistics,
    error: OutputError | None,
    method: Method,
    config: Any,
    refit_bias: bool,
    int8: bool = False,
) -> tuple[Layer, LayerRow]:
    """Compresses a layer without replacing it in the model.

    Args:
        layer: the dense layer.
        statistics: moments of its input, including H and the mean. The method sees those that it needs.
        error: the error of its dense weights, if the target is not their own output.
        method: the method that solves it.
        config: the method's config.
        refit_bias: let the bias, if any, absorb the mean of the lost output.
        int8: round the weights to int8. The statistics are those of the quantized input.

    Returns:
        the layer that replaces it, and its figures.

    Raises:
        InputError: the method refuses the layer; the message names it.
        RunError: the result is not finite.
    """
    start = time.perf_counter()
    weight = dense = layer.module.weight.detach().float()
    bias: Tensor | None = layer.module.bias
    statistics = statistics.to(weight.device)
    refit_bias = refit_bias and bias is not None

    def known(moments: InputStatistics) -> InputStatistics:
        return moments if method.needs == "full" else moments.diagonal()

    def keep_all(part: Tensor, moments: InputStatistics) -> Decomposition:
        return measured(part, known(moments), part)

    def solve(part: Tensor, moments: InputStatistics) -> Decomposition:
        return method.solve(part, known(moments), config)

    removes, rounded = config.total_compression() > 0, []
    try:
        if error is not None:
            weight, bias = corrected(weight, bias, statistics, error.to(weight.device), refit_bias)
        problem = LayerProblem(weight, bias, layer.heights, statistics, refit_bias)
        parts = problem.solve(solve if removes else keep_all)
        if not all(is_finite(x) for part in parts for x in (part.S, part.U, part.V)):
            raise RunError(f"{layer.name}: the result is not finite (NaN or Inf): raise `damping`, or use another `method`")
        if int8:
            if removes and not bitmask.saves(len(weight), weight.shape[1], sum(p.kept_parameters for p in parts), each=1):
                removes, parts = False, problem.solve(keep_all)  # a dense matrix is smaller
            damping = getattr(config, "damping", DAMPING)
            rounded = [
                quantized(w, known(problem.moments), p, damping)
                for w, p in zip(weight.split(layer.heights), parts, strict=True)
            ]
            parts = [p.error for p in rounded]
    except InputError as refusal:
        raise InputError(f"{layer.name}: {refusal}") from None
    found = torch.cat([p.S + p.U @ p.V for p in parts])
    if refit_bias:
        bias = problem.refitted_bias(weight - found)
    compressed = int8_layer(rounded, bias, removes) if int8 else SparseLowRankLinear.from_decompositions(parts, bias)
    shift = None if bias is None or bias is layer.module.bias else bias - layer.module.bias
    total = sum(p.objective / p.relative_error**2 for p in parts if p.relative_error)
    return compressed, LayerRow(
        name=layer.name,
        d_out=weight.shape[0],
        d_in=weight.shape[1],
        ranks=tuple(p.U.shape[1] for p in parts),
        nonzeros=compressed.nonzeros,
        kept_parameters=compressed.kept_parameters,
        relative_error=output_error(dense, found - dense, shift, statistics),
        solver_error=(sum(p.objective for p in parts) / total) ** 0.5 if total else 0.0,
        steps=max(p.steps for p in parts),
        seconds=time.perf_counter() - start,
    )


def int8_layer(parts: list[Int8Decomposition], bias: Tensor | None, factored: bool) -> Layer:
    """The layer of rounded parts, in the order of their rows: ``factored``, or dense if S is all there is."""
    S = torch.cat([p.S[0] for p in parts]), torch.cat([p.S[1] for p in parts])
    if not factored:
        return Int8Linear(S, bias)
    return Int8SparseLowRankLinear(S, [p.U for p in parts], [p.V for p in parts], bias)


@torch.inference_mode()
def int8_linear(linear: nn.Linear, statistics: InputStatistics) -> Int8Linear:
    """Rounds a dense layer, of which nothing is removed, for its quantized input of these full statistics."""
    weight = linear.weight.detach().float()
    problem = LayerProblem(
        weight, linear.bias, (len(weight),), statistics.to(weight.device), refit_bias=linear.bias is not None
    )
    found = quantized(weight, problem.moments, measured(weight, problem.moments, weight))
    return Int8Linear(found.S, problem.refitted_bias(weight - found.error.S) if problem.refit_bias else None)
