"""OpenVINO, a rival of ONNX Runtime, and its int8 files, made by NNCF. Both packages belong to the extra ``openvino``."""

import contextlib
import importlib.util
import io
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def quantize(dense: Path, int8: Path, images: Sequence[np.ndarray]) -> None:
    """NNCF's quantization of a transformer: weights and activations of the linear layers, with fixed scales.

    Args:
        dense: an ONNX file.
        int8: the file to write, in OpenVINO's own format: NAME.xml, with the weights in NAME.bin beside it.
        images: calibration images, [1, 3, h, w] each.
    """
    os.environ["NNCF_CI"] = "1"  # otherwise NNCF reports its use over the network
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        model = openvino.Core().read_model(str(dense))
        images = list(images)
        kind = nncf.ModelType.TRANSFORMER
        quantized = nncf.quantize(model, nncf.Dataset(images), model_type=kind, subset_size=len(images))
        openvino.save_model(quantized, str(int8), compress_to_fp16=False)


def open_file(file: Path, precision: str, threads: int, images: np.ndarray) -> Callable[[], object]:
    """A function that runs a file on images in OpenVINO.

    Args:
        file: an ONNX file, or one in OpenVINO's format.
        precision: "f32" or "bf16", of everything that the file does not have in int8.
        threads: CPU threads.
        images: [b, 3, h, w].
    """
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = openvino.compile_model(str(file), "CPU", settings).create_infer_request()
    return lambda: request.infer([images])
