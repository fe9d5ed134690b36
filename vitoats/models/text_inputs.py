"""The inputs of a causal language model: windows of tokens, and what the model makes of hidden states."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.models.on_disk import held

LOGITS_AT_A_TIME = 2**25  # elements, to bound memory: a vocabulary has up to 260,000 tokens


@dataclass(frozen=True)
class TextInputs:
    """Batches [b, seq_len] of token ids, int64.

    Attributes:
        seq_len: number of tokens of a window.
        vocab_size: number of tokens that the model knows.
    """

    seq_len: int
    vocab_size: int

    def zeros(self, n: int) -> Tensor:
        """A batch of n windows of the first token, for use if only shapes matter."""
        return torch.zeros(n, self.seq_len, dtype=torch.long)

    def noise(self, n: int, seed: int = 0) -> Tensor:
        """A batch of n windows of random tokens, reproducible by seed."""
        return torch.randint(self.vocab_size, (n, self.seq_len), generator=torch.Generator().manual_seed(seed))

    def call(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The logits [b, seq_len, vocab_size]."""
        return model(input_ids=batch, use_cache=False).logits

    def features(self, model: Any, batch: Tensor) -> Tensor:
        """The final hidden states [b * seq_len, width], from which the head computes the logits."""
        return model.base_model(input_ids=batch, use_cache=False).last_hidden_state.flatten(0, 1)

    def features_of(self, model: Any, hidden: Tensor) -> Tensor:
        """The same, computed from the hidden states after the last block."""
        with blocks_give(model, hidden):
            return self.features(model, _any_tokens(hidden))

    def logits_of(self, model: Any, hidden: Tensor) -> Iterator[Tensor]:
        """The logits [n, vocab_size] of some tokens after others, from the hidden states [b, t, width] after the last block."""
        tokens = hidden.flatten(0, 1).split(max(1, LOGITS_AT_A_TIME // self.vocab_size))
        with held(model.get_output_embeddings()):
            for some in tokens:
                with blocks_give(model, some[:, None]):  # as windows of a single token
                    logits = self.call(model, _any_tokens(some[:, None]))
                yield logits[:, 0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _any_tokens(hidden: Tensor) -> Tensor:
    return hidden.new_zeros(hidden.shape[:2], dtype=torch.long)


def decoder_blocks(model: nn.Module) -> list[str]:
    """Names of a language model's blocks: the children of its outermost list of modules with the most parameters."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = sum(parameter.numel() for parameter in module.parameters())
    if not found:
        return []
    largest = max(found, key=lambda name: found[name])
    return [f"{largest}.{child}" for child, _ in model.get_submodule(largest).named_children()]


@contextmanager
def blocks_give(model: nn.Module, hidden: Tensor) -> Iterator[None]:
    """In this context, no block runs: each returns ``hidden`` in the form in which it returns hidden states."""
    with blocks_run_as(model, lambda _name, _args, _kwargs: hidden):
        yield


@contextmanager
def blocks_run_as(model: nn.Module, run: Callable[[str, tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
    """In this context, ``run`` stands for each block: it takes a block's name and arguments, and returns hidden states."""
    modules = {name: model.get_submodule(name) for name in decoder_blocks(model)}

    def forward(name: str, in_tuple: bool) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            hidden = run(name, args, kwargs)
            return (hidden, None) if in_tuple else hidden

        return stand_in

    try:
        for name, module in modules.items():
            module.forward = forward(name, getattr(module, RETURNS_TUPLE, False))
        yield
    finally:
        for module in modules.values():
            del module.forward


RETURNS_TUPLE = (
    "returns_tuple"  # attribute of a block, set by the adapter: whether hidden states are the first of several outputs
)
