"""Builds a model without memory, on torch's meta device, to compare its size with its weight file before it is allocated.

A compressed layer takes at least one mask bit per weight, 1/32 of the dense matrix, plus U and V. A model without some of its
heads or neurons is built in full first. Therefore the model in a file of n bytes is limited to ``GROWTH`` n + ``ALWAYS`` bytes.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError
from vitoats.loading.timm_config import TimmConfig

import timm  # isort: skip

GROWTH = 64
ALWAYS = 2**28  # bytes that any model may have, for example for position embeddings of larger images
UNSAVED = 100  # number of tensors that a model may have without being in its file


@dataclass(frozen=True)
class Held:
    """The size of a weight file: number of ``tensors``, and ``bytes``."""

    tensors: int
    bytes: int


WITHOUT_FILE = Held(10_000, 2**35 // GROWTH)  # for random weights: models of up to 32 GiB


def sketch(config: TimmConfig, held: Held, **arguments: Any) -> nn.Module:
    """Builds the model on the meta device.

    Args:
        config: the model's configuration.
        held: the size of its weight file.
        arguments: arguments in addition to those of the configuration.

    Raises:
        InputError: the model is too large for its file. timm's own errors are passed on.
    """
    with no_more_than(held, config.path), torch.device("meta"):
        return create(config, **arguments)


def create(config: TimmConfig, **arguments: Any) -> nn.Module:
    """Builds the model with random weights."""
    return timm.create_model(
        config.architecture, pretrained=False, pretrained_cfg=config.pretrained_cfg, **(config.model_args | arguments)
    )


@contextlib.contextmanager
def no_more_than(held: Held, path: Path) -> Iterator[None]:
    """Aborts the construction of a model in this thread as soon as it is far larger than its weight file.

    Args:
        held: the size of the file.
        path: the file that describes the model, for the error.

    Raises:
        InputError: the model is too large.
    """
    thread, found, size = threading.get_ident(), 0, 0
    tensors, n_bytes = 2 * held.tensors + UNSAVED, GROWTH * held.bytes + ALWAYS

    def note(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        nonlocal found, size
        if tensor is None or threading.get_ident() != thread:
            return
        found, size = found + 1, size + tensor.nbytes
        if found > tensors or size > n_bytes:
            raise InputError(f"{path} describes a model far larger than the file with its weights: copy the folder again")

    handles = [
        registration.register_module_parameter_registration_hook(note),
        registration.register_module_buffer_registration_hook(note),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
