"""Finds the chain of blocks of a vision transformer and the linear layers in it, by structure rather than by name.

Blocks are the children of all lists named ``blocks``. A forward pass determines what the attributes do not tell: the order of
the blocks, whether each output really is the next block's input, which linear layers are called as modules (only those can be
replaced), and the further arguments of the blocks besides the hidden state (such as a rotary embedding). Models with stages
(Swin, ConvNeXt) run a downsampling module between two blocks, which makes hidden states smaller and wider. It is a link of the
chain like a block. A model that does not fit is rejected with the reason.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vitoats.common.errors import InputError
from vitoats.format.int8_layers import int8_linears
from vitoats.format.layers import compressed_layers
from vitoats.models.blocks import Block, BlockCall, LinearLayer, ModelAdapter, same
from vitoats.models.causal_lm import adapt_language_model
from vitoats.models.hooks import first_input, watch_calls, watch_inputs
from vitoats.models.inputs import ImageInputs, ModelInputs, TextInputs

_REMEDY = "use a ViT-like model (docs/models.md)"

FUSED_PARTS = {"qkv": 3}  # number of equal parts that a layer's rows stack, by the last component of its name


@torch.no_grad()  # not inference mode: the blocks' arguments that it finds may be needed for gradients
def adapt(model: nn.Module, inputs: ModelInputs) -> ModelAdapter:
    """Creates the adapter of a model.

    Args:
        model: the model in eval mode, with one list ``blocks``, or one for each stage.
        inputs: the model's inputs.

    Raises:
        InputError: the model is already compressed or has no chain of blocks, with the reason.
    """
    if compressed_layers(model) or int8_linears(model):
        raise InputError("the model is compressed already: start from the dense one")
    if isinstance(inputs, TextInputs):  # a language model
        return adapt_language_model(model, inputs)
    kind = type(model).__name__
    call_fused_qkv(model)
    names = _blocks(model)
    if not names:
        raise InputError(f"{kind} has no list named 'blocks', so its blocks cannot be compressed one by one: {_REMEDY}")
    noise = inputs.noise(2).to(next(model.parameters()).device)
    probe = _probe(model, names, inputs, noise)
    again = _probe(model, names, inputs, noise[:1] * 0.5)
    for name, call, other in zip(probe.names, probe.calls, again.calls, strict=True):
        if not same(call, other):
            raise InputError(
                f"{kind} passes something to {name} that depends on the image, "
                f"which calibration by blocks cannot keep: {_REMEDY}"
            )
    skipped: list[tuple[str, str]] = []
    blocks = [
        Block(model, name, _linears(model, name, probe, again, skipped), call, before, after)
        for name, call, before, after in zip(probe.names, probe.calls, probe.shapes, probe.shapes[1:], strict=False)
    ]
    if not any(block.linears for block in blocks):
        raise InputError(f"the blocks of {kind} have no linear layers that are called: {_REMEDY}")
    inside = {name for block in blocks for name, _ in block.module.named_modules(prefix=block.name)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in inside:
            skipped.append((name, "outside the blocks"))
        elif isinstance(module, nn.Conv2d):
            skipped.append((name, "a convolution"))
    return ModelAdapter(model, inputs, blocks, skipped)


def _linears(
    model: nn.Module, block: str, probe: "_Probe", again: "_Probe", skipped: list[tuple[str, str]]
) -> list[LinearLayer]:
    """The compressible layers of a block; appends the other ones to ``skipped``, with the reason."""
    found = []
    for name, module in model.get_submodule(block).named_modules(prefix=block):
        if isinstance(module, nn.MultiheadAttention):
            skipped.append((f"{name}.in_proj", "torch's own attention, whose weights are no layers"))
        if not isinstance(module, nn.Linear):
            continue
        if name not in probe.called:
            skipped.append((name, "its weight is used directly, not by calling the layer"))
        elif probe.called[name] == again.called[name]:
            skipped.append((name, "its input is the same for all images"))
        else:
            parts = FUSED_PARTS.get(name.rpartition(".")[2], 1)
            found.append(LinearLayer(model, name, parts if module.out_features % parts == 0 else 1))
    order = list(probe.called)
    return sorted(found, key=lambda layer: order.index(layer.name))


def call_fused_qkv(model: nn.Module) -> None:
    """Makes timm call fused qkv layers as modules and add the bias afterwards.

    BEiT, EVA and Swin v2 store the biases of q and v separately and use the weight of qkv directly, so that a replacement of
    the qkv layer would never run. timm's own switch changes this; outputs stay the same up to rounding.
    """
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # type: ignore[assignment]


def _blocks(model: nn.Module) -> list[str]:
    """Names of the children of all lists ``blocks``, except for lists inside another block.

    Lists without any linear layer, such as those of a convolutional stem, count only if all lists are like that.
    """
    found: list[str] = []
    with_linears: list[str] = []
    for name, module in model.named_modules():
        is_list = name.rpartition(".")[2] == "blocks" and isinstance(module, (nn.Sequential, nn.ModuleList))
        if is_list and not _inside(name, found):
            children = [f"{name}.{child}" for child, _ in module.named_children()]
            found += children
            with_linears += children if any(isinstance(inner, nn.Linear) for inner in module.modules()) else []
    return with_linears or found


def _inside(name: str, blocks: list[str]) -> bool:
    return any(name.startswith(block + ".") for block in blocks)


class _Probe:
    """Follows the hidden state through one forward pass, from the first block to the last.

    Attributes:
        names: names of the chain's links: the blocks, and the modules that run between two of them.
        calls: the further arguments of each link besides the hidden state.
        shapes: shape of one image's hidden state before each link, and after the last one.
        called: shape of the first input of each linear layer that was called, in order of the calls.
    """

    def __init__(self, kind: str, blocks: list[str], n_images: int):
        self.kind, self.blocks, self.n_images = kind, blocks, n_images
        self.names: list[str] = []
        self.calls: list[BlockCall] = []
        self.shapes: list[tuple[int, ...]] = []
        self.called: dict[str, torch.Size] = {}
        self._hidden = torch.empty(0)  # output of the last link
        self._running: tuple[str, BlockCall] | None = None

    def before(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before a block, or a module that may be a link of the chain, runs."""
        is_block = name in self.blocks
        if self._running or not (is_block or self.names):
            return
        hidden = first_input(args, kwargs)
        call = BlockCall(args[1:], kwargs if args else {key: value for key, value in kwargs.items() if key != "x"})
        if not self._is_batch(hidden):
            self._refuse(is_block, f"the blocks of {self.kind} take no batch of hidden states first")
        elif not self.names:
            self.shapes.append(tuple(hidden.shape[1:]))
            self._running = name, call
        elif not same(hidden, self._hidden):
            self._refuse(is_block, f"in {self.kind} the output of {self.names[-1]} is not the input of {name}")
        else:
            self._running = name, call

    def after(self, name: str, output: Any) -> None:
        """Called when a block or module returns."""
        if self._running is None or self._running[0] != name:
            return
        call, self._running = self._running[1], None
        is_block = name in self.blocks
        if not self._is_batch(output):
            self._refuse(is_block, f"the blocks of {self.kind} return more than hidden states")
        elif is_block or not same(output, self._hidden):
            self.names.append(name)
            self.calls.append(call)
            self.shapes.append(tuple(output.shape[1:]))
            self._hidden = output.clone()

    def finish(self) -> None:
        """Removes the links after the last block, and checks that each block has run exactly once."""
        ran = [name for name in self.names if name in self.blocks]
        once = sum(ran.count(name) == 1 for name in self.blocks)
        if once < len(self.blocks):
            raise InputError(
                f"{self.kind} runs {once} of its {len(self.blocks)} blocks once in a forward pass, the others not: {_REMEDY}"
            )
        end = self.names.index(ran[-1]) + 1
        del self.names[end:], self.calls[end:], self.shapes[end + 1 :]

    def _is_batch(self, hidden: Any) -> bool:
        return isinstance(hidden, Tensor) and hidden.ndim > 1 and hidden.shape[0] == self.n_images

    def _refuse(self, is_block: bool, reason: str) -> None:
        if is_block:  # other modules need not be part of the chain
            raise InputError(f"{reason}: {_REMEDY}")


def _probe(model: nn.Module, blocks: list[str], inputs: ImageInputs, batch: Tensor) -> _Probe:
    """Runs the model once and records its chain of blocks and the calls of its linear layers.

    Raises:
        InputError: the blocks do not form a chain.
    """
    probe = _Probe(type(model).__name__, blocks, len(batch))
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    links = {
        name: module
        for name, module in modules.items()
        if name and not _inside(name, blocks) and not any(block.startswith(f"{name}.") for block in blocks)
    }
    with (
        watch_inputs(linears, lambda name, x: probe.called.setdefault(name, x.shape)),
        watch_calls(links, probe.before, lambda name, _args, _kwargs, output: probe.after(name, output)),
    ):
        inputs.call(model, batch)
    probe.finish()
    return probe
