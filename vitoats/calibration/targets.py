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
bias is refitted. Any method then takes W + dW for its weights. GPTAQ (arXiv 2504.02692) calls this asymmetric calibration; the
term of the residual stream and the refitted bias are ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitoats.calibration.hidden_states import gram, input_moments
from vitoats.calibration.paths import CompressedPath, DensePath
from vitoats.common.errors import InputError
from vitoats.methods.hessian import cholesky
from vitoats.methods.statistics import InputStatistics, StatisticsLevel
from vitoats.models.adapter import LinearLayer, ModelAdapter

Target = Literal["block", "sequential", "dense", "residual"]
FROM_DENSE_PATH: tuple[Target, ...] = ("dense", "residual")
RIDGE = 0.01  # of the mean of diag(H)
TOKENS_PER_INPUT = 64  # of a layer; where there are twice as many, its moments are taken of every second token, and so on


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


def layer_inputs(
    adapter: ModelAdapter,
    index: int,
    linears: list[LinearLayer],
    path: CompressedPath,
    dense: DensePath | None,
    target: Target,
    needs: StatisticsLevel,
) -> Iterator[tuple[LinearLayer, InputStatistics, OutputError | None]]:
    """Yields each layer of a block with what is known of its input; the caller compresses a layer before it asks for the next.

    Args:
        adapter: the model.
        index: which block.
        linears: its linear layers, in the order in which they are called.
        path: the compressed path.
        dense: the dense path, for the targets "dense" and "residual".
        target: see the module.
        needs: what the method needs to know.
    """
    if dense is None:
        groups = [linears] if target == "block" else [[linear] for linear in linears]
        for group in groups:
            statistics = path.hidden.statistics(adapter, index, group, needs)
            yield from ((linear, statistics[linear.name], None) for linear in group)
        return
    tokens = path.hidden.values.numel() // adapter.linear(linears[0]).in_features
    for done, linear in enumerate(linears):
        path.finish(adapter, index, linears[:done], linears[done:])
        stride = token_stride(tokens, adapter.linear(linear).in_features)
        measured = _measure(adapter, index, linear, path, dense, stride)
        dense.keep_for(adapter, index, linears[done + 1 :])
        yield linear, *measured
    path.finish(adapter, index, linears, [])


def token_stride(tokens: int, d_in: int) -> int:
    """Every how many-th of all images' tokens is measured for a layer, with targets from the dense path."""
    return max(1, tokens // (TOKENS_PER_INPUT * d_in))


@torch.inference_mode()
def _measure(
    adapter: ModelAdapter, index: int, linear: LinearLayer, path: CompressedPath, dense: DensePath, stride: int
) -> tuple[InputStatistics, OutputError]:
    """Runs both paths up to a layer: the full moments of its input, and of the error of its dense weights.

    Of each batch every ``stride``-th token counts, from another first one in the next batch.
    """
    inner = adapter.name_in_block(index, linear)
    addition = dense.additions.get(linear.name)
    names = [inner] if addition is None else [inner, addition.stream]
    weight = adapter.linear(linear).weight.detach()
    sums: list[Tensor] = []
    tokens = 0
    for batch in range(path.hidden.n_batches):
        paths = path.inputs(adapter, index, batch, names), dense.inputs(adapter, index, batch, names)
        got, wanted = ({k: v.reshape(-1, v.shape[-1])[batch % stride :: stride].float() for k, v in p.items()} for p in paths)
        x, lost = got[inner], wanted[inner] - got[inner]
        if addition is None:  # e = W lost: its moments are W times those of lost, which are smaller
            e = lost
        else:
            gap = wanted[addition.stream] - got[addition.stream]
            e = lost @ weight.T.float() + torch.where(addition.gamma == 0, 0, gap / addition.gamma)
        parts = [gram(x), x.sum(dim=0), e.T @ x, e.sum(dim=0)]
        if sums:
            for total, part in zip(sums, parts, strict=True):
                total += part
        else:
            sums = [part.double() for part in parts]
        tokens += len(x)
    H, mean, cross, error = (total.div_(tokens) for total in sums)
    if not all(torch.isfinite(moment).all() for moment in (H, cross)):
        raise InputError(
            f"activations at {linear.name} are not finite (NaN or Inf): check the weights and the calibration images"
        )
    if addition is None:
        cross, error = weight.double() @ cross, weight.double() @ error
    return input_moments(H, mean), OutputError(cross, error)


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
