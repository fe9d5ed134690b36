"""Finished blocks of a compression on disk, so that an interrupted run can resume."""

import logging
import shutil
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitoats.common import ranks
from vitoats.common.errors import InputError, RunError
from vitoats.common.kept_files import UnfitError, read_tensors, read_values, write_tensors, write_values
from vitoats.compression.layer import LayerRow, unpacked_layer
from vitoats.format import factored
from vitoats.format.factored import Layer
from vitoats.loading.checkpoint import about

log = logging.getLogger("vitoats")

STATE = "state.json"
NORM = "norm of "  # begins the names of changed parameters of norms


class BlockStore:
    """Keeps each finished block in a folder, so that an interrupted run can resume.

    ``state.json`` holds the run's fingerprint, ``block_<i>.safetensors`` a block's compressed layers and their figures. A run
    with another model, other images or other settings is refused; a block that this run did not write is compressed again, and
    a damaged ``state.json`` is written again. Of several processes, the first one writes, and all read.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        resume: bool = False,
        types: Mapping[str, torch.dtype] | None = None,
        temporary: bool = False,
    ):
        """Opens or creates the folder.

        Args:
            folder: the folder.
            fingerprint: identifies the run.
            resume: use the blocks that it holds.
            types: of the tensors of the dense model; compressed layers are kept in the type of their dense weights.
            temporary: remove the folder when this object is no longer used.

        Raises:
            InputError: the folder belongs to another run, or it already holds blocks and ``resume`` is False.
            RunError: the folder is not writable.
        """
        self._temporary = temporary
        if temporary and ranks.is_first():
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder, self.fingerprint, self._types = folder, fingerprint, types or {}
        if not ranks.is_first():
            return
        if finished := _block_files(folder):
            if not resume:
                raise InputError(
                    f"{folder} holds an interrupted run: add `resume` to go on with it, or delete the folder to start anew"
                )
            written = _fingerprint_of(folder)
            if written not in (None, fingerprint):
                raise InputError(
                    f"{folder} is from a run with another model, other images or other settings: "
                    f"repeat its command with `resume`, or delete the folder to start anew"
                )
            log.info("resuming: %d finished blocks in %s", len(finished), folder)
            if written is not None:
                return
        try:
            write_values(folder / STATE, STATE, fingerprint)
        except RunError:
            self.remove()
            raise

    def save(self, index: int, layers: dict[str, Layer], rows: list[LayerRow], norms: dict[str, Tensor]) -> None:
        """Writes a finished block; ``norms`` are parameters of its norms that were changed, by name."""
        if not ranks.is_first():
            return
        tensors = {NORM + name: norm for name, norm in norms.items()}
        for name, layer in layers.items():
            tensors |= factored.pack(name, layer, self._types.get(f"{name}.weight"))
        tensors = {k: v.contiguous().cpu() for k, v in tensors.items()}
        path, key = self.folder / _file_name(index), _key(index, self.fingerprint)
        write_tensors(path, key, tensors, [asdict(row) for row in rows], "free some space, then add `resume`")

    def load(self, index: int, names: list[str]) -> tuple[dict[str, Layer], list[LayerRow], dict[str, Tensor]] | None:
        """Reads a finished block; None if there is none, or if this run did not write it.

        Args:
            index: the block's index.
            names: names of its compressed layers.

        Raises:
            RunError: the first process has read the block, and this one cannot.
        """
        found = self._read(index, names) if ranks.is_first() else None
        if ranks.from_first(lambda: found is not None) and not ranks.is_first():
            found = self._read(index, names)
            if found is None:
                raise RunError(
                    f"{self.folder / _file_name(index)} cannot be read by every process: put `output` on a shared disk"
                )
        return found

    def _read(self, index: int, names: list[str]) -> tuple[dict[str, Layer], list[LayerRow], dict[str, Tensor]] | None:
        path = self.folder / _file_name(index)
        try:
            tensors, values = read_tensors(path, _key(index, self.fingerprint))
            rows = [LayerRow.of(value) for value in values]
            if [row.name for row in rows] != names:
                raise UnfitError("it has other layers")
            norms = {name.removeprefix(NORM): tensor for name, tensor in tensors.items() if name.startswith(NORM)}
            return {value["name"]: unpacked_layer(tensors, value)[0] for value in values}, rows, norms
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            log.warning("%s is no block of this run (%s): block %d is made anew", path, error, index)
            return None

    def finished(self, index: int, names: list[str]) -> tuple[dict[str, Layer], dict[str, Tensor]]:
        """The layers of a block that has been saved, and its norms' changed parameters.

        Raises:
            RunError: the file is damaged or gone.
        """
        found = self._read(index, names)
        if found is None:
            raise RunError(f"{self.folder / _file_name(index)} is gone or damaged: start anew")
        return found[0], found[2]

    def settle(self) -> None:
        """After an interruption: logs that finished blocks are kept, or removes the folder if there are none."""
        if not ranks.is_first():
            return
        finished = len(_block_files(self.folder))
        if finished and not self._temporary:
            log.warning("%d finished blocks are kept in %s: add `resume` to go on, or delete the folder", finished, self.folder)
        else:
            self.remove()

    def remove(self) -> None:
        """Removes the folder, once its blocks are no longer needed."""
        shutil.rmtree(self.folder, ignore_errors=True)


def is_output_of(partial: Path, output: Path, format: str) -> bool:
    """Whether a folder that compress wrote in this format came from these finished blocks: whether it has their figures."""
    rows: list[Any] = []
    try:
        fingerprint = read_values(partial / STATE, STATE)
        for index in range(len(_block_files(partial))):
            rows += read_tensors(partial / _file_name(index), _key(index, fingerprint))[1]
        said, figures = about(output), [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        return bool(rows) and (said.get("layers"), said.get("format")) == (figures, format)
    except (OSError, ValueError, AttributeError):
        return False


def _file_name(index: int) -> str:
    return f"block_{index}.safetensors"


def _key(index: int, fingerprint: str) -> str:
    return f"block {index} of {fingerprint}"


def _block_files(folder: Path) -> list[Path]:
    return list(folder.glob("block_*.safetensors"))


def _fingerprint_of(folder: Path) -> str | None:
    """The fingerprint in ``state.json``; None if that is damaged, since each block has a digest with the fingerprint, too."""
    try:
        return str(read_values(folder / STATE, STATE))
    except (OSError, UnfitError) as error:
        log.warning("%s is damaged (%s) and is made anew: each block is checked by itself", folder / STATE, error)
        return None
