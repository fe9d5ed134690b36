"""A language model whose blocks and head are read from its folder when they run, so that it may be larger than memory.

Blocks compute in float32, whatever the type in which their weights are stored. A folder whose tensors have other names than the
model's, since transformers renames or combines them while it reads them, is not read this way.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitoats.common.errors import InputError, one_line
from vitoats.format.factored import Layer
from vitoats.loading.shards import tensor_files
from vitoats.loading.sketch import Held, no_more_than
from vitoats.loading.timm_config import CONFIG
from vitoats.loading.weights import TensorKind, open_tensors, tensor_kinds
from vitoats.models.causal_lm import call_linears, conv1d_names
from vitoats.models.on_disk import OnDisk, parameters_on_meta
from vitoats.models.text_inputs import decoder_blocks

Tensors = dict[str, Tensor]
Changes = Callable[[], tuple[dict[str, Layer], Tensors]]  # gives compressed layers, and other changed parameters, by name
Write = Callable[[str, Tensor | Layer], Tensors]  # the name of a tensor or a layer, and it -> what a file holds of it


class PieceByPiece(Mapping[str, Tensor]):
    """Tensors by name, of which those of one piece at a time are in memory."""

    def __init__(self, pieces: Mapping[str, Iterable[str]], read: Callable[[str], Tensors]):
        """``read`` gives the tensors of a piece, of which ``pieces`` has the names; it is called at each change of pieces."""
        self._piece_of = {name: piece for piece, names in pieces.items() for name in names}
        self._read, self._held = read, Tensors()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._held:
            self._held = {}  # dropped before the next piece is read
            self._held = self._read(self._piece_of[name])
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._piece_of)

    def __len__(self) -> int:
        return len(self._piece_of)


class ModelOnDisk:
    """What is known of a model whose blocks and head are on disk.

    Attributes:
        model: the model; what lies outside blocks and head is in memory.
    """

    def __init__(self, model: Any, files: Mapping[str, Path], transposed: set[str], device: torch.device):
        """Reads what stays in memory.

        Args:
            model: the model on the meta device, whose ``Conv1D`` layers have been replaced by linear ones.
            files: for each tensor of the model, tied ones once, the file that holds it.
            transposed: those that the file holds transposed.
            device: where the model runs.
        """
        self.model, self._files, self._transposed, self._device = model, files, transposed, device
        self._changes: dict[str, Changes] = {}
        head = model.get_output_embeddings()
        heads = [name for name, module in model.named_modules() if module is head and f"{name}.weight" in files]
        names = [*decoder_blocks(model), *heads]
        groups = {name: [key for key in files if key.startswith(f"{name}.")] for name in names}
        inside = {key for keys in groups.values() for key in keys}
        self._groups = {"": [key for key in files if key not in inside], **groups}
        model.load_state_dict(self._dense(self._groups[""]), strict=False, assign=True)
        model.tie_weights()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self._modules = [OnDisk(model.get_submodule(name), partial(self._current, name)) for name in names]

    def compressed(self, block: str, changes: Changes) -> None:
        """Layers of a block have been replaced, and other parameters may have changed; ``changes`` reads what is new."""
        self._changes[block] = changes

    def dense(self) -> Mapping[str, Tensor]:
        """The dense model's tensors, as stored, tied ones once."""
        return PieceByPiece(self._groups, lambda group: dict(self._read(self._groups[group])))

    def written(self, write: Write) -> Mapping[str, Tensor]:
        """What ``write`` makes of the model as it is now: of its compressed layers, and of its other tensors as stored."""
        groups = {group: list(self._written(group, write)) for group in self._groups}
        return PieceByPiece(groups, partial(self._written, write=write))

    def types(self) -> dict[str, torch.dtype]:
        """The types in which the dense model's tensors are stored, by name."""
        return {name: tensor.dtype for names in self._groups.values() for name, tensor in self._read(names)}

    def read_whole(self) -> None:
        """Makes it an ordinary model in memory."""
        for module in self._modules:
            module.stay()

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The dense model's tensors with these names, as they are stored.

        Each maps its file anew, whose pages count as the process's as long as the tensor is held.
        """
        for name in names:
            with open_tensors(self._files[name]) as file:
                tensor = file.get_tensor(name)
            yield name, tensor.T.contiguous() if name in self._transposed else tensor

    def _dense(self, names: Iterable[str]) -> Tensors:
        return {name: _widened(tensor, self._device) for name, tensor in self._read(names)}

    def _current(self, group: str) -> Tensors:
        """The tensors of a module as it is now, by name inside it."""
        layers, others = self._changed(group)
        tensors = self._dense(_outside(self._groups[group], layers)) | others
        tensors |= {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}
        return {name.removeprefix(f"{group}."): tensor.to(self._device) for name, tensor in tensors.items()}

    def _written(self, group: str, write: Write) -> Tensors:
        layers, others = self._changed(group)
        tensors = dict(self._read(_outside(self._groups[group], layers)))
        tensors |= {name: tensor.to(tensors[name].dtype) for name, tensor in others.items()}
        parts = [write(name, value) for name, value in (tensors | layers).items()]
        return {name: tensor for part in parts for name, tensor in part.items()}

    def _changed(self, group: str) -> tuple[dict[str, Layer], Tensors]:
        return self._changes[group]() if group in self._changes else ({}, {})


def _widened(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy in float32, unless it holds integers."""
    return tensor.to(device).to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _outside(names: Iterable[str], layers: Iterable[str]) -> list[str]:
    """The names of tensors that are not of one of these layers."""
    inside = tuple(f"{layer}." for layer in layers)
    return [name for name in names if not name.startswith(inside)]


def open_on_disk(folder: Path, config: Any, device: str) -> ModelOnDisk | None:
    """Opens a transformers folder without reading its blocks.

    Args:
        folder: the folder.
        config: its transformers configuration.
        device: the torch device that the model will run on.

    Returns:
        None if the names or shapes of the tensors in the files are not those of the model.

    Raises:
        InputError: files are missing or damaged.
    """
    from transformers import AutoModelForCausalLM

    stored = config.dtype or torch.float32
    held: dict[str, TensorKind] = {}
    files: dict[str, Path] = {}
    for path in tensor_files(folder):
        try:
            with open_tensors(path) as file:
                kinds = tensor_kinds(file)
        except Exception as error:  # safetensors raises an error of its own
            raise InputError(f"{path} cannot be loaded ({one_line(error, 100)}): copy the folder again") from None
        held |= kinds
        files |= dict.fromkeys(kinds, path)
    n_bytes = sum(path.stat().st_size for path in set(files.values()))
    try:
        with no_more_than(Held(len(held), n_bytes), folder / CONFIG), parameters_on_meta():
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # transformers and torch raise various errors on sizes and names that cannot be
        reason = one_line(error, 100)
        raise InputError(f"{folder / CONFIG} describes no model that can be built ({reason}): copy the folder again") from None
    model.eval().requires_grad_(False)
    shapes = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys
    }
    if any(name not in held or held[name].shape != shape for name, shape in shapes.items()):
        return None
    transposed = {f"{name}.weight" for name in conv1d_names(model)}
    call_linears(model)
    model.config.dtype = stored  # that of the folder that will be written, too
    return ModelOnDisk(model, {name: files[name] for name in shapes}, transposed, torch.device(device))
