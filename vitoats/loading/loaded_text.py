"""A language model together with its tokenizer, name and origin."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vitoats.common.errors import InputError
from vitoats.loading.origin import Origin
from vitoats.models.inputs import TextInputs


@dataclass(frozen=True)
class Packing:
    """How text becomes inputs: documents are packed into windows of ``seq_len`` tokens."""

    seq_len: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"seq_len": self.seq_len}

    def __str__(self) -> str:
        return f"windows of {self.seq_len} tokens"


@dataclass
class LoadedLanguageModel(Origin):
    """A causal language model ready for evaluation or compression.

    Attributes:
        name: the name that the model was requested by.
        model: the transformers model, in eval mode.
        tokenizer: its transformers tokenizer; None if there is none.
        preprocessing: how text becomes inputs.
        weights: the source of its weights, in words.
        about: the content of vitoats.json for a model that compress wrote; empty for others.
    """

    name: str
    model: Any
    tokenizer: Any
    preprocessing: Packing
    weights: str
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def backbone(self) -> nn.Module:
        """The module with the blocks."""
        return self.model

    @property
    def inputs(self) -> TextInputs:
        """The model's inputs."""
        return TextInputs(self.preprocessing.seq_len, self.model.get_input_embeddings().num_embeddings)

    def need_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            InputError: the model has none.
        """
        if self.tokenizer is None:
            raise InputError(f"{self.name} has no tokenizer: put its tokenizer.json there, or give `tokenizer`")
        return self.tokenizer
