"""Finished blocks of a compression on disk, so that an interrupted run can resume."""

import logging
import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

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

T = TypeVar("T")

STATE = "state.json"
BLOCK = "block"  # the stage that leaves a finished block
NORM = "norm of "  # begins the names of changed parameters of norms


class RunFolder:
    """What a run has finished, in a folder, so that an interrupted run can resume.

    ``state.json`` holds the run's fingerprint. A run with another model, other images or other settings is refused; a file that
    this run did not write is made again, and a damaged ``state.json`` is written again. Of several processes, the first one
    writes, and all read.
    """

    def __init__(self, folder: Path, fingerprint: str, resume: bool = False, temporary: bool = False):
        """Opens or creates the folder.

        Args:
            folder: the folder.
            fingerprint: identifies the run.
            resume: use what it holds.
            temporary: remove the folder when this object is no longer used.

        Raises:
            InputError: the folder belongs to another run, or it already holds something and ``resume`` is False.
            RunError: the folder is not writable.
        """
        self._temporary, self._remedy = temporary, "repeat the command" if resume else "add `resume`"
        if temporary and ranks.is_first():
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder, self.fingerprint = folder, fingerprint
        if not ranks.is_first():
            return
        if finished := _finished(folder):
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
            log.info("resuming: %s in %s", finished, folder)
            if written is not None:
                return
        try:
            write_values(folder / STATE, STATE, fingerprint)
        except RunError:
            self.remove()
            raise

    def write(self, stage: str, index: int, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Writes what a stage of the run has made of a block.

        Raises:
            RunError: the disk is full.
        """
        if ranks.is_first():
            tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            remedy = f"free some space, then {self._remedy}"
            write_tensors(self.folder / _file_name(stage, index), _key(stage, index, self.fingerprint), tensors, values, remedy)

    def read(self, stage: str, index: int, convert: Callable[[dict[str, Tensor], Any], T]) -> T | None:
        """What a stage has made of a block; None if there is nothing, or if this run did not write it.

        Args:
            stage: its name.
            index: the block's index.
            convert: makes the result of tensors and values; raises ValueError, KeyError or TypeError if it cannot.

        Raises:
            RunError: the first process has read it, and this one cannot.
        """
        found = self._read(stage, index, convert) if ranks.is_first() else None
        if ranks.from_first(lambda: found is not None) and not ranks.is_first():
            found = self._read(stage, index, convert)
            if found is None:
                path = self.folder / _file_name(stage, index)
                raise RunError(f"{path} cannot be read by every process: put `output` on a shared disk")
        return found

    def _read(self, stage: str, index: int, convert: Callable[[dict[str, Tensor], Any], T]) -> T | None:
        path = self.folder / _file_name(stage, index)
        try:
            return convert(*read_tensors(path, _key(stage, index, self.fingerprint)))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            log.warning("%s is no block of this run (%s): block %d is made anew", path, error, index)
            return None

    def settle(self) -> None:
        """After an interruption: logs that finished blocks are kept, or removes the folder if there are none."""
        if not ranks.is_first():
            return
        finished = _finished(self.folder)
        if finished and not self._temporary:
            log.warning("%s are kept in %s: %s to go on, or delete the folder", finished, self.folder, self._remedy)
        else:
            self.remove()

    def remove(self) -> None:
        """Removes the folder, once its blocks are no longer needed."""
        shutil.rmtree(self.folder, ignore_errors=True)


class BlockStore(RunFolder):
    """Keeps the compressed layers of each finished block, and their figures, in ``block_<i>.safetensors``."""

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        resume: bool = False,
        types: Mapping[str, torch.dtype] | None = None,
        temporary: bool = False,
    ):
        """Opens or creates the folder; see ``RunFolder``.

        Args:
            folder, fingerprint, resume, temporary: as there.
            types: of the tensors of the dense model; compressed layers are kept in the type of their dense weights.
        """
        super().__init__(folder, fingerprint, resume, temporary)
        self._types = types or {}

    def save(self, index: int, layers: dict[str, Layer], rows: list[LayerRow], norms: dict[str, Tensor]) -> None:
        """Writes a finished block; ``norms`` are parameters of its norms that were changed, by name."""
        tensors = {NORM + name: norm for name, norm in norms.items()}
        for name, layer in layers.items():
            tensors |= factored.pack(name, layer, self._types.get(f"{name}.weight"))
        self.write(BLOCK, index, tensors, [asdict(row) for row in rows])

    def load(self, index: int, names: list[str]) -> tuple[dict[str, Layer], list[LayerRow], dict[str, Tensor]] | None:
        """Reads a finished block; None if there is none, or if this run did not write it.

        Args:
            index: the block's index.
            names: names of its compressed layers.

        Raises:
            RunError: the first process has read the block, and this one cannot.
        """
        return self.read(BLOCK, index, partial(_unpacked, names))

    def finished(self, index: int, names: list[str]) -> tuple[dict[str, Layer], dict[str, Tensor]]:
        """The layers of a block that has been saved, and its norms' changed parameters.

        Raises:
            RunError: the file is damaged or gone.
        """
        found = self._read(BLOCK, index, partial(_unpacked, names))
        if found is None:
            raise RunError(f"{self.folder / _file_name(BLOCK, index)} is gone or damaged: start anew")
        return found[0], found[2]


def _unpacked(
    names: list[str], tensors: dict[str, Tensor], values: Any
) -> tuple[dict[str, Layer], list[LayerRow], dict[str, Tensor]]:
    rows = [LayerRow.of(value) for value in values]
    if [row.name for row in rows] != names:
        raise UnfitError("it has other layers")
    norms = {name.removeprefix(NORM): tensor for name, tensor in tensors.items() if name.startswith(NORM)}
    return {value["name"]: unpacked_layer(tensors, value)[0] for value in values}, rows, norms


def is_output_of(kept: Path, output: Path, format: str) -> bool:
    """Whether a folder that compress wrote in this format came from these finished blocks: whether it has their figures."""
    rows: list[Any] = []
    try:
        fingerprint = read_values(kept / STATE, STATE)
        for index in range(len(_files(kept, BLOCK))):
            rows += read_tensors(kept / _file_name(BLOCK, index), _key(BLOCK, index, fingerprint))[1]
        said, figures = about(output), [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        return bool(rows) and (said.get("layers", said.get("modules")), said.get("format")) == (figures, format)
    except (OSError, ValueError, AttributeError):
        return False


def _file_name(stage: str, index: int) -> str:
    return f"{stage}_{index}.safetensors"


def _key(stage: str, index: int, fingerprint: str) -> str:
    return f"{stage} {index} of {fingerprint}"


def _files(folder: Path, stage: str) -> list[Path]:
    return list(folder.glob(f"{stage}_*.safetensors"))


def _finished(folder: Path) -> str:
    """What a folder holds, in words; "" for nothing."""
    if blocks := len(_files(folder, BLOCK)):
        return f"{blocks} finished blocks"
    return "first measurements" if _files(folder, "*") else ""


def _fingerprint_of(folder: Path) -> str | None:
    """The fingerprint in ``state.json``; None if that is damaged, since each block has a digest with the fingerprint, too."""
    try:
        return str(read_values(folder / STATE, STATE))
    except (OSError, UnfitError) as error:
        log.warning("%s is damaged (%s) and is made anew: each block is checked by itself", folder / STATE, error)
        return None
