"""Opens an ONNX file as a session of ONNX Runtime on the CPU, with the native operator; reads the metadata of vitoats."""

import contextlib
import logging
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from vitoats.common.errors import InputError, one_line
from vitoats.common.json_files import parse_json
from vitoats.common.sizes import from_json, sides
from vitoats.format.operator import ATTENTION, DENSE_INT8, NAME, NEWEST_DOMAIN_VERSION
from vitoats.runtime import library
from vitoats.runtime.densify import densified
from vitoats.runtime.opsets import domain_version

METADATA_KEY = "vitoats"
ANY_VERSION = 1000  # in files that ONNX Runtime wrote, of every domain with custom operators
HALF = "tensor(float16)"  # as ONNX Runtime's errors say it
SPIN = "20"  # microseconds for which a thread waits for work before it sleeps; old versions ignore it

log = logging.getLogger("vitoats")


class Session(ort.InferenceSession):
    """An ``onnxruntime.InferenceSession`` that knows which of its nodes the native library runs.

    Attributes:
        native_nodes: names of the nodes of linear layers that have a native kernel; empty without the native library.
    """

    native_nodes: tuple[str, ...] = ()


def session(path: str | Path, threads: int = 0, native: bool = True, profile_to: Path | None = None) -> Session:
    """Opens an ONNX file, with the native operator if the library is installed.

    Without the library the same file runs as standard operators, correctly but at dense speed, and a warning is logged.

    Args:
        path: the file.
        threads: threads for one inference; 0 for all cores.
        native: whether to use the library.
        profile_to: beginning of the name of the file to which ``end_profiling`` writes ONNX Runtime's profile; None for none.

    Raises:
        InputError: the file does not exist, is from a newer vitoats, ONNX Runtime cannot run it, or VITOATS_ISA is invalid.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no ONNX file {path}: write one with tools/export_onnx.py")
    version = domain_version(path)
    if NEWEST_DOMAIN_VERSION < version != ANY_VERSION:
        raise InputError(f"{path} was written by a newer vitoats (operators of version {version}): upgrade vitoats")
    options = _options(threads, profile_to)
    if native and library.register(options):
        return _with_library(options, _options(threads, profile_to), path)
    if version and _mentions_operators(path):
        if native:
            log.warning("%s runs at dense speed: vitoats was installed without its native library", path)
        if (model := densified(path)) is not None:
            with contextlib.suppress(InputError):  # then ONNX Runtime gets the file as it is
                return _open(model, options, path)
    return _open(str(path), options, path)


def _options(threads: int, profile_to: Path | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN)
    if profile_to is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
    return options


def _with_library(options: ort.SessionOptions, without_library: ort.SessionOptions, path: Path) -> Session:
    """Opens a file with the registered library; warns if another tool has changed it so that the library is of no use."""
    try:
        opened = _open(str(path), options, path)
    except InputError as error:
        if HALF not in str(error):
            raise
        log.warning("%s runs at dense speed: a tool has converted our nodes to float16 (name them in its op_block_list)", path)
        return _open(str(path), without_library, path)
    if not opened.native_nodes and _had_sparse_nodes(opened):
        log.warning("%s runs at dense speed: a tool has unpacked its sparse nodes (docs/deploy.md lists what tools do)", path)
    return opened


def _had_sparse_nodes(opened: Session) -> bool:
    """Whether a file had sparse nodes when it was exported; what its metadata should be is checked by those who use them."""
    try:
        return bool(metadata(opened).get("sparse_nodes"))
    except ValueError:
        return False


def _open(model: str | bytes, options: ort.SessionOptions, path: Path) -> Session:
    try:
        with library.Watch() as watch:
            # without its fallback, which prints, and tries the same again
            opened = Session(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime's errors share no public base class
        raise InputError(f"{path} does not run in ONNX Runtime ({one_line(error)}): export it again") from None
    opened.native_nodes = tuple(watch.nodes)
    return opened


def _mentions_operators(path: Path) -> bool:
    """Whether a file that imports our operators may use them; one of standard operators only does not."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(name.encode()) >= 0 for name in (NAME, DENSE_INT8, ATTENTION))


def data_file(path: Path) -> Path:
    """Where the weights of a model are that is exported with external data: MODEL.onnx.data."""
    return path.with_name(f"{path.name}.data")


def stored_bytes(path: Path) -> int:
    """Size of an ONNX file, and of its weights if they are in a second one."""
    return sum(file.stat().st_size for file in (path, data_file(path)) if file.is_file())


def metadata(opened: ort.InferenceSession) -> dict[str, Any]:
    """The metadata that vitoats wrote: preprocessing, class count, compression, versions; empty for other files.

    Raises:
        ValueError: it is damaged.
    """
    found = parse_json(opened.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "{}"))
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    return found


def image_shape(opened: ort.InferenceSession) -> tuple[int, ...]:
    """The shape of one image that a session takes; the usual size where height and width are free.

    Raises:
        InputError: they are free, and the file does not say which size is usual.
    """
    shape = opened.get_inputs()[0].shape[1:]
    if all(isinstance(n, int) for n in shape):
        return tuple(shape)
    try:
        return (shape[0], *sides(from_json(metadata(opened)["preprocessing"]["img_size"])))
    except (ValueError, KeyError, TypeError):
        raise InputError("the file takes images of any size and names no usual one: export it again") from None


def inference(opened: ort.InferenceSession, batch: np.ndarray) -> Callable[[], object]:
    """A function that runs a session with one input on a batch."""
    feed = {opened.get_inputs()[0].name: batch}
    return lambda: opened.run(None, feed)
