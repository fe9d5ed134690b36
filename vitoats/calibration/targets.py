"""Reconstruction targets: what a compressed layer should output, and from which inputs.

"block" is what the papers do: a layer should reproduce the output of its own dense weights. The inputs of all linear layers
of a block come from the compressed blocks before it, while the block itself is dense. Each further target costs more passes:

    sequential   inputs are measured again after each compressed layer, so a layer sees the errors of those before it
    dense        a layer should reproduce its output in the dense model, from its input in the compressed one
    residual     a layer that adds to the residual stream should also make up for the stream's error so far

In the last two, let x be the input on the compressed path, x_d that on the dense path, and s, s_d the residual stream before
an output scaled by gamma is added to it. The error of the layer's dense weights W is then

    e = W (x_d - x) + (s_d - s) / gamma        ("dense" without the second term)

A linear layer corrects this by dW = E[e x^T] (H + ridge * mean(diag H) I)^-1; if the bias is refitted, all moments are about
the mean. Every method then approximates W + dW.

In the field's terms, "sequential" is *true sequential*, as in the code of GPTQ and SparseGPT. Both "block" and "sequential"
are *symmetric calibration*: dense and compressed weights are compared on the same inputs. "dense" and "residual" are
*asymmetric calibration* (GPTAQ, arXiv 2504.02692); the residual stream's term and the refitted bias are ours.

A layer with int8 weights quantizes its input, and x is the quantized one: the targets from the dense path then also make up for
what that loses.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.calibration.moments import RunningMeans, exact, full_statistics, gram, input_statistics
from vitoats.calibration.paths import CompressedPath, DensePath
from vitoats.common import linalg
from vitoats.common.errors import InputError
from vitoats.format.int8 import fake_quantized
from vitoats.methods.hessian import cholesky
from vitoats.methods.statistics import InputStatistics, StatisticsLevel
from vitoats.models.blocks import Block, LinearLayer

Target = Literal["block", "sequential", "dense", "residual"]
FROM_DENSE_PATH: tuple[Target, ...] = ("dense", "residual")
RIDGE = 0.01  # share of the mean of diag(H): the damping of GPTQ's published code; other values: docs/oats-h.md, Constants
# of a layer; with twice as many, its moments use every second token, and so on (docs/oats-h.md, The target)
TOKENS_PER_INPUT = 64


@dataclass(frozen=True)
class OutputError:
    """How far a layer's dense weights miss its target on the compressed path's inputs: moments of e, float64.

    Attributes:
        cross: [d_out, d_in], mean over tokens of e x^T.
        mean: [d_out], mean over tokens of e.
    """

    cross: Tensor
    mean: Tensor

    def to(self, device: torch.device) -> "OutputError":
        """The same moments on another device."""
        return OutputError(self.cross.to(device), self.mean.to(device))


def token_stride(tokens: int, d_in: int) -> int:
    """The n for which every n-th token is measured for a layer, with targets from the dense path."""
    return max(1, tokens // (TOKENS_PER_INPUT * d_in))


class SymmetricCalibration:
    """For the targets "block" and "sequential": only the compressed path is needed."""

    def __init__(self, hidden: HiddenStates, target: Target, level: StatisticsLevel, int8: bool):
        """``hidden`` starts before the first block and is advanced in place; ``int8``: layers quantize their inputs."""
        self.hidden = hidden
        self._target, self._level, self._int8 = target, level, int8
        self._block: Block
        self._linears: list[LinearLayer] = []
        self._measured: dict[str, InputStatistics] = {}

    def enter(self, block: Block, linears: list[LinearLayer]) -> None:
        """Enters the next block, still dense; its layers ``linears`` will be compressed in this order."""
        self._block, self._linears, self._measured = block, linears, {}

    def measure(self, layer: LinearLayer) -> tuple[InputStatistics, None]:
        """The statistics of a layer's input, with H in any case, to measure its error; all layers before it are compressed."""
        if layer.name not in self._measured:
            self._measure(self._linears if self._target == "block" else [layer])
        return self._measured.pop(layer.name), None

    def measure_all(self) -> None:
        """Measures all layers of the block at once, for the target "block"."""
        self._measure(self._linears)

    def _measure(self, layers: list[LinearLayer]) -> None:
        names = [x.name for x in layers]
        self._measured = input_statistics(self.hidden, self._block, self._level, names, self._int8, for_errors=True)

    def finish(self, layer: LinearLayer) -> None:
        """Called once a layer is compressed."""

    def advance(self, block: Block) -> None:
        """Moves on to the next block."""
        self.hidden.advance(block)


class AsymmetricCalibration:
    """For the targets "dense" and "residual": the compressed path is compared with the dense one."""

    def __init__(self, hidden: HiddenStates, target: Target, keep: bool, int8: bool):
        """``hidden`` starts before the first block and is advanced in place.

        ``keep`` avoids computing things twice; ``int8``: layers quantize their inputs.
        """
        self.hidden = hidden
        self._compressed = CompressedPath(hidden, keep)
        self._dense = DensePath(hidden.copy(hidden.spill_to), keep)
        self._residual, self._int8 = target == "residual", int8
        self._block: Block
        self._pending: list[LinearLayer] = []
        self._tokens = 0

    def enter(self, block: Block, linears: list[LinearLayer]) -> None:
        """Enters the next block, still dense; its layers ``linears`` will be compressed in this order."""
        self._dense.enter(block, linears, self._residual)
        self._compressed.enter(block, linears)
        self._block, self._pending = block, list(linears)
        tokens = self.hidden.values[:1].numel() // linears[0].module.in_features if linears else 0  # of an image
        self._tokens = self.hidden.n_images * tokens

    @torch.inference_mode()
    def measure(self, layer: LinearLayer) -> tuple[InputStatistics, OutputError]:
        """The full statistics of a layer's input, and the error of its dense weights; all layers before it are compressed.

        Both paths run up to the layer. Every ``token_stride``-th token of a batch counts; the first one differs from batch to
        batch.
        """
        inner = self._block.name_inside(layer)
        addition = self._dense.additions.get(layer.name)
        names = [inner] if addition is None else [inner, addition.stream]
        weight = layer.module.weight.detach()
        stride = token_stride(self._tokens, layer.module.in_features)
        means, shift = RunningMeans(), None
        for batch in range(self.hidden.n_batches):
            paths = self._compressed.inputs(batch, names), self._dense.inputs(batch, names)
            got, wanted = (
                {k: self.hidden.thinned(v.reshape(-1, v.shape[-1]), batch, stride).float() for k, v in path.items()}
                for path in paths
            )
            if got[inner].shape != wanted[inner].shape:
                raise InputError(
                    f"{layer.name} gets other tokens in the compressed model than in the dense one: use `target='block'`"
                )
            x = fake_quantized(got[inner]) if self._int8 else got[inner]
            lost = wanted[inner] - x
            if addition is None:  # e = W lost: its moments are W times those of lost, which are smaller
                e = lost
            else:
                gap = wanted[addition.stream] - got[addition.stream]
                e = lost @ weight.T.float() + torch.where(addition.gamma == 0, 0, gap / addition.gamma)
            shift = x.mean(dim=0) if shift is None else shift
            x = exact(x - shift)
            e = e.to(x)
            means.add([gram(x), x.sum(dim=0), e.T @ x, e.sum(dim=0)], len(x))
        assert shift is not None
        (H, mean, cross, error), shift = means.finish_about(layer.name, shift)
        cross += torch.outer(error, shift.double())
        if addition is None:
            cross, error = weight.double() @ cross, weight.double() @ error
        self._pending.remove(layer)
        self._dense.keep_for(self._pending)
        return full_statistics(H, mean, shift), OutputError(cross, error)

    def finish(self, layer: LinearLayer) -> None:
        """Called once a layer is compressed."""
        self._compressed.finish(layer)

    def advance(self, block: Block) -> None:
        """Moves on to the next block."""
        self._compressed.advance(block)
        self._dense.advance(block)


Calibration = SymmetricCalibration | AsymmetricCalibration


def calibration_for(
    target: Target, hidden: HiddenStates, level: StatisticsLevel, keep: bool, int8: bool = False
) -> Calibration:
    """Makes the calibration of a model that is compressed for a target.

    Args:
        target: see the module's docstring.
        hidden: the hidden states before the first block.
        level: which statistics of each layer's input to collect; "full" for the targets from the dense path.
        keep: keep intermediate results instead of computing them again, for these targets.
        int8: whether the compressed layers will quantize their inputs.
    """
    if target in FROM_DENSE_PATH:
        return AsymmetricCalibration(hidden, target, keep, int8)
    return SymmetricCalibration(hidden, target, level, int8)


def corrected(
    weight: Tensor, bias: Tensor | None, statistics: InputStatistics, error: OutputError, refit_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The dense weights that best reach the target from the compressed path's inputs.

    Args:
        weight: W [d_out, d_in].
        bias: [d_out].
        statistics: uncentred moments of the inputs.
        error: the error of W on these inputs.
        refit_bias: whether the bias absorbs the means.

    Returns:
        W + dW [d_out, d_in] and the bias.
    """
    moments, cross, mean = statistics.centred() if refit_bias else statistics, error.cross, statistics.mean
    if refit_bias:
        assert mean is not None
        cross = cross - torch.outer(error.mean, mean)
    damped = moments.full.clone()
    damped.diagonal().add_(moments.ridge(RIDGE) or 1.0)
    dW = linalg.cholesky_solve(cross.T, cholesky(damped)).T
    if refit_bias:
        assert bias is not None
        assert mean is not None
        bias = (bias.double() + error.mean - dW @ mean).to(bias)
    return (weight.double() + dW).to(weight), bias
