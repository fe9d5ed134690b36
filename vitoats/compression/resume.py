"""Finished blocks of a compression on disk, so that an interrupted run can go on."""

import hashlib
import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from vitoats.common.errors import InputError, RunError
from vitoats.common.files import save_tensors
from vitoats.compression.pipeline import LayerRow
from vitoats.format import factored
from vitoats.format.layers import SparseLowRankLinear

log = logging.getLogger("vitoats")


class BlockStore:
    """Keeps each finished block in a folder, so that an interrupted run can go on.

    ``state.json`` holds the run's fingerprint, ``block_<i>.safetensors`` a block's compressed layers and their figures; each
    file appears whole or not at all. A run with another model, other images or other settings is refused.
    """

    def __init__(self, folder: Path, fingerprint: str, resume: bool):
        """Opens or creates the folder.

        Raises:
            InputError: it belongs to another run, or it is there and ``resume`` was not asked for.
            RunError: it cannot be written.
        """
        self.folder = folder
        about = folder / "state.json"
        if about.is_file():
            if not resume:
                raise InputError(
                    f"{folder} holds an interrupted run: add `resume` to go on with it, or delete the folder to start anew"
                )
            if _read_fingerprint(about) != fingerprint:
                raise InputError(
                    f"{folder} is from a run with another model, other images or other settings: "
                    f"repeat its command with `resume`, or delete the folder to start anew"
                )
            log.info("resuming: %d finished blocks in %s", len(list(folder.glob("block_*.safetensors"))), folder)
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            about.write_text(json.dumps({"fingerprint": fingerprint}))
        except OSError as error:
            raise RunError(f"{folder} cannot be written ({error.strerror}): give another `output`") from None

    def save(self, index: int, layers: dict[str, SparseLowRankLinear], rows: list[LayerRow]) -> None:
        """Writes a finished block."""
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            tensors |= factored.pack(name, layer)
        about = {"rows": json.dumps([asdict(row) for row in rows])}
        partial, final = self._file(index).with_suffix(".writing"), self._file(index)
        try:
            save_tensors(partial, {k: v.contiguous().cpu() for k, v in tensors.items()}, about)
            partial.rename(final)
        except (OSError, safetensors.SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise RunError(f"{final} cannot be written ({error}): free some space, then add `resume`") from None

    def load(self, index: int) -> tuple[dict[str, SparseLowRankLinear], list[LayerRow]] | None:
        """Reads a finished block, None if there is none."""
        if not self._file(index).is_file():
            return None
        try:
            return _read_block(self._file(index))
        except (safetensors.SafetensorError, InputError, KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{self._file(index)} is damaged ({type(error).__name__}): "
                f"delete it, or the folder, and run again with `resume`"
            ) from None

    def settle(self) -> None:
        """After an interruption: says that finished blocks are kept, or removes the folder if there are none."""
        finished = len(list(self.folder.glob("block_*.safetensors")))
        if finished:
            log.warning("%d finished blocks are kept in %s: add `resume` to go on, or delete the folder", finished, self.folder)
        else:
            self.remove()

    def remove(self) -> None:
        """Removes the folder, once its blocks are needed no more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, index: int) -> Path:
        return self.folder / f"block_{index}.safetensors"


def _read_fingerprint(about: Path) -> str:
    try:
        return str(json.loads(about.read_text())["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{about} is damaged: delete its folder to start anew") from None


def _read_block(path: Path) -> tuple[dict[str, SparseLowRankLinear], list[LayerRow]]:
    with safetensors.safe_open(str(path), "pt") as file:
        rows = [LayerRow(**{**row, "ranks": tuple(row["ranks"])}) for row in json.loads(file.metadata()["rows"])]
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    layers = {}
    for row in rows:
        row_blocks = [(row.d_out // len(row.ranks), rank) for rank in row.ranks]
        layers[row.name] = factored.unpack(row.name, tensors, row_blocks, row.d_in)
    return layers, rows


def fingerprint(model: nn.Module, settings: dict[str, Any]) -> str:
    """Identifies a run: a hash of all weights and of the settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
