"""Finds the blocks of a causal language model and the linear layers in them, by structure rather than by name.

Blocks are the children of the outermost list of modules with the most parameters. Short forward passes determine the rest: that
the model is causal, that each block's output is the next block's input, which layers are called, and that blocks, run one by
one with the arguments of a single window, compute what the model does. Arguments are kept for each block, since masks may
differ by layer. A model that does not fit is rejected with the reason.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.common.errors import InputError
from vitoats.format.layers import replace_module
from vitoats.models.blocks import Block, BlockCall, LinearLayer, ModelAdapter, same
from vitoats.models.hooks import watch_calls, watch_inputs
from vitoats.models.text_inputs import RETURNS_TUPLE, TextInputs, blocks_run_as, decoder_blocks

REMEDY = "use a decoder such as Llama, Mistral, Qwen, Phi, Gemma, GPT-2 (docs/language-models.md)"
PROBED = 24  # tokens of the windows on which the structure is probed
TOLERANCE = 1e-4  # between the model and its blocks run one by one, relative to the largest output
FUSED_HALVES = ("gate_up_proj",)  # the last components of the names of layers that stack matrices
FUSED_QKV = ("qkv_proj", "c_attn")


@torch.no_grad()
def adapt_language_model(model: Any, inputs: TextInputs) -> ModelAdapter:
    """Creates the adapter of a language model.

    Args:
        model: a transformers model in eval mode; its ``Conv1D`` layers are replaced by linear ones that compute the same.
        inputs: the model's inputs.

    Raises:
        InputError: the model is no causal decoder with a chain of blocks, with the reason.
    """
    kind = type(model).__name__
    call_linears(model)
    names = decoder_blocks(model)
    if not names:
        raise InputError(f"{kind} has no list of blocks: {REMEDY}")
    _refuse_stacked_experts(kind, model, names)
    windows = TextInputs(min(inputs.seq_len, PROBED), inputs.vocab_size).noise(4).to(model.device)
    probe = _Probe(model, names, windows[:1])
    probe.check_chain()
    _check_causal(kind, model, inputs, windows[:2])
    other = _Probe(model, names, windows[1:2])
    for name in names:
        if not same(probe.calls[name], other.calls[name]):
            raise InputError(f"{kind} passes something to {name} that depends on the text: {REMEDY}")
    _check_replay(kind, model, names, probe, windows[2:])
    calls, shape = _full_calls(model, inputs)
    skipped: list[tuple[str, str]] = []
    called = probe.called | other.called
    blocks = [Block(model, name, _linears(model, name, called, skipped), calls[name], shape, shape) for name in names]
    if not any(block.linears for block in blocks):
        raise InputError(f"the blocks of {kind} have no linear layers that are called: {REMEDY}")
    tied = model.get_output_embeddings()
    for name, module in model.named_modules():
        if any(name == block or name.startswith(f"{block}.") for block in names):
            if isinstance(module, nn.modules.conv._ConvNd):
                skipped.append((name, "a convolution"))
        elif isinstance(module, nn.Embedding):
            skipped.append((name, "an embedding"))
        elif isinstance(module, nn.Linear):
            shared = module is tied and module.weight is model.get_input_embeddings().weight
            skipped.append((name, "tied to the embedding" if shared else "outside the blocks"))
    return ModelAdapter(model, inputs, blocks, skipped)


def call_linears(model: nn.Module) -> None:
    """Replaces the transposed linear layers of GPT-2's kind (``Conv1D``, weight [d_in, d_out]) by ``nn.Linear``."""
    for name in conv1d_names(model):
        module: Any = model.get_submodule(name)
        d_in, d_out = module.weight.shape
        linear = nn.Linear(d_in, d_out, dtype=module.weight.dtype, device="meta")
        linear.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=False)
        linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
        replace_module(model, name, linear)


def conv1d_names(model: nn.Module) -> list[str]:
    """Names of a model's ``Conv1D`` layers."""
    return [name for name, module in model.named_modules() if type(module).__name__ == "Conv1D" and hasattr(module, "nf")]


class _Probe:
    """One forward pass on a single window.

    Attributes:
        calls: each block's arguments besides the hidden states.
        before, after: hidden states before and after each block.
        called: names of the linear layers that were called, in order.
    """

    def __init__(self, model: Any, names: list[str], tokens: Tensor):
        self.model, self.names = model, names
        self.calls: dict[str, BlockCall] = {}
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}
        self.called: dict[str, None] = {}
        self.ran: list[str] = []
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        with (
            watch_inputs(linears, lambda name, _x: self.called.setdefault(name)),
            watch_calls({name: model.get_submodule(name) for name in names}, self._enter, self._leave),
        ):
            model(input_ids=tokens, use_cache=False)

    def _enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ran.append(name)
        hidden, self.calls[name] = split_call(args, kwargs)
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise InputError(f"the blocks of {type(self.model).__name__} take no hidden states first: {REMEDY}")
        self.before[name] = hidden.clone()

    def _leave(self, name: str, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        setattr(self.model.get_submodule(name), RETURNS_TUPLE, isinstance(output, tuple))
        self.after[name] = (output[0] if isinstance(output, tuple) else output).clone()

    def check_chain(self) -> None:
        """Checks that all blocks ran once, in order, each on the output of the one before."""
        kind = type(self.model).__name__
        if self.ran != self.names:
            raise InputError(f"{kind} does not run its {len(self.names)} blocks once each, in order: {REMEDY}")
        for name, following in zip(self.names, self.names[1:], strict=False):
            if not torch.equal(self.after[name], self.before[following]):
                raise InputError(f"in {kind} the output of {name} is not the input of {following}: {REMEDY}")


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, BlockCall]:
    """The hidden states of a block's call, and its other arguments."""
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states", None), BlockCall((), rest)


def _check_causal(kind: str, model: Any, inputs: TextInputs, windows: Tensor) -> None:
    """Refuses a model in which tokens see those after them."""
    windows = torch.stack([windows[0], torch.cat([windows[0, :-1], windows[1, -1:]])])
    if windows.shape[1] < 2 or torch.equal(windows[0], windows[1]):
        return
    first, second = inputs.call(model, windows)[:, :-1]
    if (first - second).abs().max() > TOLERANCE * first.abs().max():
        raise InputError(f"{kind} is an encoder, whose tokens see those after them: {REMEDY}")


def _check_replay(kind: str, model: Any, names: list[str], probe: _Probe, windows: Tensor) -> None:
    """Refuses a model whose blocks, run one by one on several windows, do not compute what it does."""
    whole = _Probe(model, names, windows)
    hidden = whole.before[names[0]]
    try:
        for name in names:
            hidden = Block(model, name, [], probe.calls[name], (), ()).run(hidden)
        alike = bool((hidden - whole.after[names[-1]]).abs().max() <= TOLERANCE * hidden.abs().max())
    except (RuntimeError, ValueError, TypeError, IndexError):
        alike = False
    if not alike:
        raise InputError(f"the blocks of {kind}, run one by one, do not compute what it does: {REMEDY}")


def _full_calls(model: Any, inputs: TextInputs) -> tuple[dict[str, BlockCall], tuple[int, int]]:
    """Each block's arguments for a window of full length, which do not depend on the text, and the shape of hidden states."""
    calls: dict[str, BlockCall] = {}
    shape = (0, 0)

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        nonlocal shape
        hidden, calls[name] = split_call(args, kwargs)
        shape = tuple(hidden.shape[1:])
        return hidden

    with blocks_run_as(model, note):
        model.base_model(input_ids=inputs.zeros(1).to(model.device), use_cache=False)
    return calls, shape


def _linears(model: Any, block: str, called: dict[str, None], skipped: list[tuple[str, str]]) -> list[LinearLayer]:
    """The compressible layers of a block; appends the other ones to ``skipped``, with the reason."""
    order = list(dict.fromkeys(_any_expert(name) for name in called))
    experts = {getattr(model.config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts")} - {None}
    found = []
    for name, module in model.get_submodule(block).named_modules(prefix=block):
        if not isinstance(module, nn.Linear):
            continue
        if _any_expert(name) not in order:
            skipped.append((name, "its weight is used directly, not by calling the layer"))
        elif module.out_features in experts:
            skipped.append((name, "a router"))
        else:
            heights = _heights(name, module, model.config)
            found.append(LinearLayer(model, name, len(heights), heights if len(set(heights)) > 1 else None))
    return sorted(found, key=lambda layer: order.index(_any_expert(layer.name)))


def _any_expert(name: str) -> str:
    """A layer's name with the number of the expert left out, since a short text does not reach all experts."""
    return re.sub(r"(?<=\.experts)\.\d+(?=\.)", "", name)


def _heights(name: str, module: nn.Linear, config: Any) -> tuple[int, ...]:
    """Heights of the matrices that a layer's rows stack: queries, keys and values, or gate and up."""
    d_out, last = module.out_features, name.rpartition(".")[2]
    if last in FUSED_HALVES and d_out % 2 == 0:
        return d_out // 2, d_out // 2
    if last in FUSED_QKV:
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        width, rest = divmod(d_out, heads + 2 * groups)
        if rest == 0:
            return heads * width, groups * width, groups * width
    return (d_out,)


def _refuse_stacked_experts(kind: str, model: nn.Module, names: list[str]) -> None:
    for name in names:
        for inner, module in model.get_submodule(name).named_modules(prefix=name):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.modules.conv._ConvNd):
                    raise InputError(
                        f"{kind} stacks the matrices of its {parameter.shape[0]} experts in one parameter ({inner}.{key}), "
                        f"so that no layer is called whose input could be measured: use a model without a mixture of experts"
                    )
