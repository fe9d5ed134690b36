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

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitoats.calibration import HiddenStates, input_moments
from vitoats.errors import InputError
from vitoats.methods.hessian import cholesky
from vitoats.methods.statistics import InputStatistics, Needs
from vitoats.models.adapter import LinearLayer, ModelAdapter

Target = Literal["block", "sequential", "dense", "residual"]
RIDGE = 0.01  # of the mean of diag(H)
EXACT = 1e-6  # a sum of a stream and a scaled output is recognised to this relative error, in float64
PROBES = 2  # images that recognise it


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


@dataclass(frozen=True)
class StreamAddition:
    """A layer's output is scaled by gamma and added to the residual stream.

    Attributes:
        stream: name in the block of the module whose input is the stream before the addition; "" for the block itself.
        gamma: [d_out].
    """

    stream: str
    gamma: Tensor


class DensePath:
    """The calibration images' way through the dense model, beside that through the compressed one."""

    def __init__(self, hidden: HiddenStates):
        self.hidden = hidden
        self.block: nn.Module  # the dense block that is being compressed, from ``enter`` on
        self.additions: dict[str, StreamAddition] = {}

    def enter(self, adapter: ModelAdapter, index: int, linears: list[LinearLayer], residual: bool) -> None:
        """Keeps a copy of a block before it is compressed, and finds where its layers add to the residual stream."""
        self.block = copy.deepcopy(adapter.block(index))
        images = self.hidden.values[:PROBES].to(self.hidden.device)
        self.additions = stream_additions(adapter, index, linears, images) if residual else {}

    def advance(self, adapter: ModelAdapter, index: int) -> None:
        """Moves on to the next block."""
        self.hidden.advance(adapter, index, self.block)


def layer_inputs(
    adapter: ModelAdapter,
    index: int,
    linears: list[LinearLayer],
    hidden: HiddenStates,
    dense: DensePath | None,
    target: Target,
    needs: Needs,
) -> Iterator[tuple[LinearLayer, InputStatistics, OutputError | None]]:
    """Yields each layer of a block with what is known of its input; the caller compresses a layer before it asks for the next.

    Args:
        adapter: the model.
        index: which block.
        linears: its linear layers, in the order in which they are called.
        hidden: the compressed path.
        dense: the dense path, for the targets "dense" and "residual".
        target: see the module.
        needs: what the method needs to know.
    """
    if target == "block":
        statistics = hidden.statistics(adapter, index, linears, needs)
        yield from ((linear, statistics[linear.name], None) for linear in linears)
        return
    for linear in linears:
        if dense is None:
            yield linear, hidden.statistics(adapter, index, [linear], needs)[linear.name], None
        else:
            yield linear, *_measure(adapter, index, linear, hidden, dense)


@torch.inference_mode()
def _measure(
    adapter: ModelAdapter, index: int, linear: LinearLayer, hidden: HiddenStates, dense: DensePath
) -> tuple[InputStatistics, OutputError]:
    """Runs both paths up to a layer: the full moments of its input, and of the error of its dense weights."""
    block_name = adapter.block_names[index]
    inner = linear.name[len(block_name) + 1 :]
    addition = dense.additions.get(linear.name)
    names = [inner] if addition is None else [inner, addition.stream]
    weight = adapter.linear(linear).weight.detach()
    sums: list[Tensor] = []
    tokens = 0
    for batch, dense_batch in zip(
        hidden.values.split(hidden.batch_size), dense.hidden.values.split(hidden.batch_size), strict=True
    ):
        got = _inputs(adapter, index, adapter.block(index), batch.to(hidden.device), names)
        wanted = _inputs(adapter, index, dense.block, dense_batch.to(hidden.device), names)
        x = got[inner].reshape(-1, weight.shape[1]).float()
        lost = wanted[inner].reshape(-1, weight.shape[1]).float() - x
        if addition is None:  # e = W lost: its moments are W times those of lost, which are smaller
            e = lost
        else:
            gap = (wanted[addition.stream] - got[addition.stream]).reshape(-1, weight.shape[0]).float()
            e = lost @ weight.T.float() + torch.where(addition.gamma == 0, 0, gap / addition.gamma)
        parts = [x.T @ x, x.sum(dim=0), e.T @ x, e.sum(dim=0)]
        sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else [part.double() for part in parts]
        tokens += len(x)
    H, mean, cross, error = (total / tokens for total in sums)
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


def stream_additions(
    adapter: ModelAdapter, index: int, linears: list[LinearLayer], hidden: Tensor
) -> dict[str, StreamAddition]:
    """Finds the layers of a block whose output, scaled channel by channel, is added to the residual stream.

    By structure, not by name: the block runs in float64, and a layer's output o qualifies if the difference of two tensors of
    the hidden states' shape, inputs of modules in the block or the block's output, is gamma o.

    Args:
        adapter: the model.
        index: which block, still dense.
        linears: its linear layers.
        hidden: a few hidden states before it.
    """
    block = copy.deepcopy(adapter.block(index)).double()
    hidden = hidden.double()
    streams: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def before(name: str, args: tuple) -> None:
        if args and isinstance(args[0], Tensor) and args[0].shape == hidden.shape:
            streams[name] = args[0].clone()

    handles = []
    for name, module in block.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, args, name=name: before(name, args)))
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(lambda _m, _a, out, name=name: outputs.update({name: out.clone()})))
    with torch.inference_mode():
        call = adapter.calls[index]
        result = block(hidden, *call.args, **call.kwargs)
    for handle in handles:
        handle.remove()

    found: dict[str, StreamAddition] = {}
    prefix = len(adapter.block_names[index]) + 1
    for linear in linears:
        o = outputs[linear.name[prefix:]]
        if o.shape != hidden.shape:
            continue
        tokens = tuple(range(o.ndim - 1))
        for name, stream in streams.items():
            for later in [*streams.values(), *([result] if result.shape == hidden.shape else [])]:
                added = later - stream
                gamma = ((added * o).sum(dim=tokens) / o.square().sum(dim=tokens)).nan_to_num(0.0)
                if added.norm() > 0 and (added - gamma * o).norm() <= EXACT * added.norm():
                    found.setdefault(linear.name, StreamAddition(name, gamma.float()))
    return found


class _AllReachedError(Exception):
    """Ends a block's forward pass once all that was asked for is known."""


def _inputs(adapter: ModelAdapter, index: int, block: nn.Module, hidden: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Runs a block until the modules ``names`` in it have been called; returns their inputs."""
    caught: dict[str, Tensor] = {}

    def catch(name: str, x: Tensor) -> None:
        caught[name] = x
        if len(caught) == len(names):
            raise _AllReachedError

    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: catch(name, args[0])) for name in names
    ]
    call = adapter.calls[index]
    try:
        block(hidden, *call.args, **call.kwargs)
    except _AllReachedError:
        return caught
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError(f"{adapter.block_names[index]} did not call all of {names}")
