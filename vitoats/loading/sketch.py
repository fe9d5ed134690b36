"""A model without memory, on torch's meta device: what a configuration asks for is compared with its file before it is built.

A compressed layer takes a bit of its mask for each weight, 1/32 of the dense matrix, and U and V beside it; a model that lost
heads or neurons is built whole first. So what a file of n bytes may stand for is bounded by ``GROWTH`` n, and a little more.
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
ALWAYS = 2**28  # bytes that any file may stand for; position embeddings of larger images among them
UNSAVED = 100  # tensors of a model that its file need not hold


@dataclass(frozen=True)
class Held:
    """How much a weight file holds: ``tensors`` and ``bytes``."""

    tensors: int
    bytes: int


WITHOUT_FILE = Held(10_000, 2**35 // GROWTH)  # for random weights: models of up to 32 GiB


def sketch(config: TimmConfig, held: Held, **arguments: Any) -> nn.Module:
    """Builds the model on the meta device.

    Args:
        config: the model.
        held: the file with its weights.
        arguments: beside those of the configuration.

    Raises:
        InputError: the model is larger than its file can be. What timm raises comes through as well.
    """
    with _no_more_than(2 * held.tensors + UNSAVED, GROWTH * held.bytes + ALWAYS, config.path), torch.device("meta"):
        return create(config, **arguments)


def create(config: TimmConfig, **arguments: Any) -> nn.Module:
    """Builds the model with random weights."""
    return timm.create_model(
        config.architecture, pretrained=False, pretrained_cfg=config.pretrained_cfg, **(config.model_args | arguments)
    )


@contextlib.contextmanager
def _no_more_than(tensors: int, n_bytes: int, path: Path) -> Iterator[None]:
    """Stops the building of a model, by this thread, as soon as it is too large."""
    thread, found, size = threading.get_ident(), 0, 0

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
