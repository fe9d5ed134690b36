"""A language model together with its tokenizer, name and origin."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.common.errors import InputError
from vitoats.loading.language_on_disk import ModelOnDisk
from vitoats.loading.origin import Origin
from vitoats.models.inputs import TextInputs

IN_MEMORY = "given in memory"  # the source of weights


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
        types: the types in which its tensors are stored; those that are not named are stored as they are.
        disk: what reads its blocks while they run; None if they are in memory.
    """

    name: str
    model: Any
    tokenizer: Any
    preprocessing: Packing
    weights: str
    about: dict[str, Any] = field(default_factory=dict)
    types: dict[str, torch.dtype] = field(default_factory=dict)
    disk: ModelOnDisk | None = None

    @property
    def backbone(self) -> nn.Module:
        """The module with the blocks."""
        return self.model

    @property
    def inputs(self) -> TextInputs:
        """The model's inputs."""
        return TextInputs(self.preprocessing.seq_len, self.model.get_input_embeddings().num_embeddings)

    def dense_tensors(self) -> Mapping[str, Tensor]:
        """The tensors of the model before it is compressed, tied ones once; those on disk are read one block at a time."""
        return self.disk.dense() if self.disk else untied_state(self.model)

    def read_whole(self) -> None:
        """Reads into memory what is on disk."""
        if self.disk:
            self.disk.read_whole()
            self.disk = None

    def need_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            InputError: the model has none.
        """
        if self.tokenizer is None:
            remedy = "give `tokenizer`" if self.weights == IN_MEMORY else "put its tokenizer.json into its folder"
            raise InputError(f"{self.name} has no tokenizer: {remedy}")
        return self.tokenizer


def untied_state(model: Any) -> dict[str, Tensor]:
    """A transformers model's state dict with each tied weight once."""
    tied = set(model.all_tied_weights_keys)
    return {key: value for key, value in model.state_dict().items() if key not in tied}
