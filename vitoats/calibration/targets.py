"""What a compressed layer is to put out, and what it gets: the ladder of targets.

"block" is what the papers do: a layer is to put out what its own dense weights make of its input, which all linear layers of
a block get from the compressed blocks before it, the block itself being dense. Each further step of the ladder costs passes:

    sequential   inputs are measured again after each compressed layer, so that a layer sees what the one before it lost
    dense        a layer is to put out what it does in the dense model, from the input that the compressed one gives it
    residual     where its output is added to the residual stream, it is also to make up for what the stream has lost so far

In the last two, with x the input on the compressed path, x_d that on the dense path, and s, s_d the residual stream before
an output scaled by gamma is added to it, the layer's dense weights W are off by

    e = W (x_d - x) + (s_d - s) / gamma        ("dense" without the second term)

What a linear layer can do about that is dW = E[e x^T] (H + ridge * mean(diag H) I)^-1, all moments about the mean where the
bias is refitted. Any method then takes W + dW for its weights.

In the field's terms "sequential" is *true sequential*, as the code of GPTQ and SparseGPT calls it, and both "block" and
"sequential" are *symmetric calibration*: dense and compressed weights are compared on the same inputs. "dense" and "residual"
are *asymmetric calibration* (GPTAQ, arXiv 2504.02692); the term of the residual stream and the refitted bias are ours.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.calibration.moments import RunningMeans, full_statistics, gram, input_statistics
from vitoats.calibration.paths import CompressedPath, DensePath
from vitoats.methods.hessian import cholesky
from vitoats.methods.statistics import InputStatistics, StatisticsLevel
from vitoats.models.blocks import Block, LinearLayer

Target = Literal["block", "sequential", "dense", "residual"]
FROM_DENSE_PATH: tuple[Target, ...] = ("dense", "residual")
RIDGE = 0.01  # of the mean of diag(H)
# of a layer; where there are twice as many, its moments are taken of every second token, and so on (docs/oats-h.md, The target)
TOKENS_PER_INPUT = 64


@dataclass(frozen=True)
class OutputError:
    """How far a layer's dense weights are from its target on the compressed path's inputs: moments of e, float64.

    Attributes:
        cross: [d_out, d_in], mean over tokens of e x^T.
        mean: [d_out], mean over tokens of e.
    """

    cross: Tensor
    mean: Tensor

    def to(self, device: torch.device) -> "OutputError":
        """The same on another device."""
        return OutputError(self.cross.to(device), self.mean.to(device))


def token_stride(tokens: int, d_in: int) -> int:
    """Every how many-th of all images' tokens is measured for a layer, with targets from the dense path."""
    return max(1, tokens // (TOKENS_PER_INPUT * d_in))


class SymmetricCalibration:
    """For the targets "block" and "sequential": all that counts is on the compressed path."""

    def __init__(self, hidden: HiddenStates, target: Target, level: StatisticsLevel):
        """``hidden`` is before the first block, and moves on."""
        self.hidden = hidden
        self._target, self._level = target, level
        self._block: Block
        self._linears: list[LinearLayer] = []
        self._measured: dict[str, InputStatistics] = {}

    def enter(self, block: Block, linears: list[LinearLayer]) -> None:
        """Comes to the next block, still dense, of which these layers will be compressed, in this order."""
        self._block, self._linears, self._measured = block, linears, {}

    def measure(self, layer: LinearLayer) -> tuple[InputStatistics, None]:
        """What is known of a layer's input; all layers before it are compressed."""
        if layer.name not in self._measured:
            layers = self._linears if self._target == "block" else [layer]
            self._measured = input_statistics(self.hidden, self._block, self._level, [x.name for x in layers])
        return self._measured.pop(layer.name), None

    def finish(self, layer: LinearLayer) -> None:
        """A layer is compressed."""

    def advance(self, block: Block) -> None:
        """Moves on to the next block."""
        self.hidden.advance(block)


class AsymmetricCalibration:
    """For the targets "dense" and "residual": the compressed path is compared with the dense one."""

    def __init__(self, hidden: HiddenStates, target: Target, keep: bool):
        """``hidden`` is before the first block, and moves on; ``keep``: what would run again is kept."""
        self.hidden = hidden
        self._compressed = CompressedPath(hidden, keep)
        self._dense = DensePath(hidden.copy(hidden.spill_to), keep)
        self._residual = target == "residual"
        self._block: Block
        self._pending: list[LinearLayer] = []
        self._tokens = 0

    def enter(self, block: Block, linears: list[LinearLayer]) -> None:
        """Comes to the next block, still dense, of which these layers will be compressed, in this order."""
        self._dense.enter(block, linears, self._residual)
        self._compressed.enter(block, linears)
        self._block, self._pending = block, list(linears)
        self._tokens = self.hidden.values.numel() // linears[0].module.in_features if linears else 0

    @torch.inference_mode()
    def measure(self, layer: LinearLayer) -> tuple[InputStatistics, OutputError]:
        """The full statistics of a layer's input, and the error of its dense weights; all layers before it are compressed.

        Both paths run up to the layer. Of each batch every ``token_stride``-th token counts, from another first one in the next
        batch.
        """
        inner = self._block.name_inside(layer)
        addition = self._dense.additions.get(layer.name)
        names = [inner] if addition is None else [inner, addition.stream]
        weight = layer.module.weight.detach()
        stride = token_stride(self._tokens, layer.module.in_features)
        means = RunningMeans()
        for batch in range(self.hidden.n_batches):
            paths = self._compressed.inputs(batch, names), self._dense.inputs(batch, names)
            got, wanted = (
                {k: v.reshape(-1, v.shape[-1])[batch % stride :: stride].float() for k, v in path.items()} for path in paths
            )
            x, lost = got[inner], wanted[inner] - got[inner]
            if addition is None:  # e = W lost: its moments are W times those of lost, which are smaller
                e = lost
            else:
                gap = wanted[addition.stream] - got[addition.stream]
                e = lost @ weight.T.float() + torch.where(addition.gamma == 0, 0, gap / addition.gamma)
            means.add([gram(x), x.sum(dim=0), e.T @ x, e.sum(dim=0)], len(x))
        H, mean, cross, error = means.finish(layer.name)
        if addition is None:
            cross, error = weight.double() @ cross, weight.double() @ error
        self._pending.remove(layer)
        self._dense.keep_for(self._pending)
        return full_statistics(H, mean), OutputError(cross, error)

    def finish(self, layer: LinearLayer) -> None:
        """A layer is compressed."""
        self._compressed.finish(layer)

    def advance(self, block: Block) -> None:
        """Moves on to the next block."""
        self._compressed.advance(block)
        self._dense.advance(block)


Calibration = SymmetricCalibration | AsymmetricCalibration


def calibration_for(target: Target, hidden: HiddenStates, level: StatisticsLevel, keep: bool) -> Calibration:
    """The calibration images on their way through a model that is compressed for a target.

    Args:
        target: see the module.
        hidden: before the first block.
        level: how much is collected of each layer's input; "full" for the targets from the dense path.
        keep: keep what would run again, for these targets.
    """
    if target in FROM_DENSE_PATH:
        return AsymmetricCalibration(hidden, target, keep)
    return SymmetricCalibration(hidden, target, level)


def corrected(
    weight: Tensor, bias: Tensor | None, statistics: InputStatistics, error: OutputError, refit_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The dense weights that best reach the target from the compressed path's inputs.

    Args:
        weight: W [d_out, d_in].
        bias: [d_out].
        statistics: of the inputs, uncentred.
        error: of W on them.
        refit_bias: whether the bias takes up the means.

    Returns:
        W + dW [d_out, d_in] and the bias.
    """
    H, cross, mean = statistics.full, error.cross, statistics.mean
    if refit_bias:
        assert mean is not None
        H = H - torch.outer(mean, mean)
        cross = cross - torch.outer(error.mean, mean)
    damped = H + RIDGE * (H.diagonal().mean().item() or 1.0) * torch.eye(len(H), dtype=H.dtype, device=H.device)
    dW = torch.cholesky_solve(cross.T, cholesky(damped)).T
    if refit_bias:
        assert bias is not None
        assert mean is not None
        bias = (bias.double() + error.mean - dW @ mean).to(bias)
    return (weight.double() + dW).to(weight), bias
