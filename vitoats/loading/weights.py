"""Reads weight files safely: pickled code is never run, and a file's header is checked before it is parsed."""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch

from vitoats.common.errors import InputError, one_line
from vitoats.loading.shards import INDEX, tensor_files

REMEDY = "give `{}` a .safetensors file, or a .pth that holds tensors only"
SETTINGS = (  # what training scripts pickle beside tensors; nothing of it is used
    r"argparse\.Namespace|pathlib\.\w+|builtins\.(int|float|list|dict|str)|collections\.defaultdict|typing\.Any"
    r"|numpy\.(dtype|ndarray|_?core\.multiarray\.(scalar|_reconstruct))|omegaconf\.[\w.]+"
)
PREFERRED = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.pth", "model.pth")  # in timm's order of preference
OTHERS = ("*.safetensors", "*.pth", "*.pth.tar", "*.bin")
OTHER_FILES = {  # what a file is by its first bytes
    b"version https://git-lfs": "a pointer of Git LFS, which git lfs pull replaces by the file",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
}
LARGEST_HEADER = 2**24  # bytes; the header for 1,000 tensors takes 0.1 MB


def read_content(path: Path, field: str = "checkpoint") -> Any:
    """Reads a file of weights; runs no pickled code.

    Args:
        path: a .pth or .safetensors file, or the index of several.
        field: the argument that names the file, for error messages.

    Returns:
        what was saved: tensors by name, or dictionaries and lists that hold them. Inert objects stand for settings.

    Raises:
        InputError: the file does not exist, or cannot be read safely.
    """
    if not path.is_file():
        raise InputError(f"there is no {field} file {path}: give `{field}` a .pth or .safetensors file")
    if path.name == INDEX:
        return {name: tensor for shard in tensor_files(path.parent) for name, tensor in read_content(shard, field).items()}
    try:
        check_header(path)
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.serialization.safe_globals(_stand_ins(path)):
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise various errors on foreign files
        unsafe = "weights_only" in str(error)
        reason = "it holds pickled objects, which are never run" if unsafe else one_line(error, 150)
        raise InputError(f"{path} cannot be read as weights ({reason}): {REMEDY.format(field)}") from None


class _Inert:
    """Stands for a pickled object that is no tensor: takes anything, keeps and runs nothing."""

    def __init__(self, *_: Any, **__: Any): ...

    def __setstate__(self, state: Any) -> None: ...


def _stand_ins(path: Path) -> list[Any]:
    """The names of a file's pickled settings, each with the class that stands for it."""
    if not zipfile.is_zipfile(path):
        return []
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(_Inert, name) for name in named if re.fullmatch(SETTINGS, name)]


def no_weights(path: Path, field: str = "checkpoint") -> InputError:
    """The error for a file without tensors."""
    return InputError(f"{path} holds no weights by name: {REMEDY.format(field)}")


def check_stored(path: Path, tensors: Mapping[str, torch.Tensor], field: str = "checkpoint") -> None:
    """Refuses tensors that take far more memory than their file: sparse ones, and expanded ones, with one number for many.

    Raises:
        InputError: one of the tensors is sparse or expanded.
    """
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise InputError(f"{path} holds a sparse tensor, {one_line(ValueError(name), 100)}: save it with to_dense()")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            named = one_line(ValueError(name), 100)
            raise InputError(f"{path} holds one number for many in {named}: {REMEDY.format(field)}")


def check_header(path: Path) -> None:
    """Refuses files of other kinds, and those that would take far more memory than their size.

    The latter are safetensors with a long header, or a compressed .pth.

    Raises:
        OSError: the file does not exist or is not a regular file.
        ValueError: the file is such a one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not there, or is no regular file")
    with open(path, "rb") as file:
        start = file.read(64)
    for mark, kind in OTHER_FILES.items():
        if start.startswith(mark):
            raise ValueError(f"it is {kind}")
    if path.suffix == ".safetensors":
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise ValueError(f"{path.name} has a header of {length:,} bytes")
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            names = packed.namelist()
            if any(name.endswith(".npy") for name in names):
                raise ValueError("it holds arrays of NumPy; timm.create_model(checkpoint_path=...) opens those of JAX")
            if any(name.endswith("/constants.pkl") for name in names):
                raise ValueError("it is TorchScript: save its state_dict()")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in packed.infolist()):
                raise ValueError(f"{path.name} is packed, which torch.save does not do")


def open_tensors(path: Path) -> Any:
    """Opens a safetensors file with ``safetensors.safe_open``.

    Raises:
        OSError, ValueError, SafetensorError: the file does not exist or is damaged.
    """
    check_header(path)
    return safetensors.safe_open(str(path), "pt")


class TensorKind(NamedTuple):
    """The shape of a tensor, and whether it holds floating-point numbers."""

    shape: tuple[int, ...]
    floating: bool


def tensor_kinds(file: Any) -> dict[str, TensorKind]:
    """The shapes and types of the tensors in an open safetensors file, from its header."""
    slices = {name: file.get_slice(name) for name in list(file.keys())}
    return {name: TensorKind(tuple(s.get_shape()), s.get_dtype().startswith(("F", "BF"))) for name, s in slices.items()}


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a file; for a safetensors file only the header is read.

    Raises:
        InputError: a file in another format cannot be read safely.
        OSError, ValueError, SafetensorError: a safetensors file does not exist or is damaged.
    """
    if path.name == INDEX:
        return {name: shape for shard in tensor_files(path.parent) for name, shape in tensor_shapes(shard).items()}
    if path.suffix != ".safetensors":
        content = read_content(path)
        return {name: tuple(tensor.shape) for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    with open_tensors(path) as file:
        return {name: kind.shape for name, kind in tensor_kinds(file).items()}


def stored_size(path: Path) -> int:
    """Bytes of a file of weights, or of those that an index names."""
    return sum(file.stat().st_size for file in (tensor_files(path.parent) if path.name == INDEX else [path]))


def weights_file(folder: Path) -> Path | None:
    """The weight file in a folder of timm or transformers, or the index of several; None if there is none."""
    named = [folder / name for name in PREFERRED]
    others = [file for pattern in OTHERS for file in sorted(folder.glob(pattern))]
    return next((file for file in (*named, *others) if file.is_file()), None)
