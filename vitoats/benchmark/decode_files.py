"""Makes the files that ``vitoats.benchmark.decode`` times: a language model dense, quantized by others, and compressed by us.

dense                    float32, by the model builder of ONNX Runtime GenAI
ort-int8, ort-4bit       ONNX Runtime's MatMulNBits, by the same builder
ort-dynamic-int8         ONNX Runtime's dynamic quantization, per channel; for models below 2 GB
llama-q8_0               llama.cpp's 8 bits, head and embedding included
native-int8              the dense model in int8 with our operators, head included
sl-50, -float16, -int8   S + U V at 50 % with our operators; the head is float32, but int8 in -int8
sl-40, unstructured-40   the same at 40 %, and zeros alone at 40 %
"""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from vitoats.benchmark.engines import has_llama_cpp
from vitoats.benchmark.gguf_file import write_gguf
from vitoats.benchmark.random_layers import Content, of_budget, random_layer
from vitoats.export.decoder import build_graph, write_decoder
from vitoats.export.external_data import LARGEST_FILE
from vitoats.export.genai_builder import Precision
from vitoats.export.int8 import quantize
from vitoats.format.layers import replace_module
from vitoats.loading.loaded_text import LoadedLanguageModel
from vitoats.methods.oats import OATSConfig
from vitoats.models.shapes import LayerShape
from vitoats.models.text_inputs import decoder_blocks
from vitoats.runtime.decoder import MODEL
from vitoats.runtime.inference import data_file, stored_bytes

DENSE, ORT_INT8, DYNAMIC, LLAMA, NATIVE_INT8 = "dense", "ort-int8", "ort-dynamic-int8", "llama-q8_0", "native-int8"
BUILT: dict[str, Precision] = {DENSE: "fp32", ORT_INT8: "int8", "ort-4bit": "int4"}
UNCOMPRESSED = (*BUILT, DYNAMIC, LLAMA, NATIVE_INT8)
FORMS = ("", "-float16", "-int8")
COMPRESSED = {"sl-50": (0.5, True, FORMS), "sl-40": (0.4, True, ("",)), "unstructured-40": (0.4, False, ("",))}
NAMES = (*UNCOMPRESSED, *(f"{name}{form}" for name, of in COMPRESSED.items() for form in of[2]))
GGUF = "model.gguf"

log = logging.getLogger("vitoats")


def make_variants(
    load: Callable[[], LoadedLanguageModel], folder: Path, names: tuple[str, ...], rank_ratio: float, seed: int
) -> dict[str, Path]:
    """Makes those of the named variants that are not in a folder yet.

    Args:
        load: loads the dense model, in new memory each time.
        folder: has a folder for each variant.
        names: some of ``NAMES``; ``dense`` is always made.
        rank_ratio: the share of the kept parameters in U and V.
        seed: of the zeros and of U and V.

    Returns:
        the variants' folders by name; those that cannot be made here are left out, with a message.
    """
    wanted = [name for name in NAMES if name in (DENSE, *names)]
    lacking = [name for name in wanted if not (folder / name).is_dir()]
    if uncompressed := [name for name in lacking if name in UNCOMPRESSED]:
        _make_uncompressed(load(), folder, uncompressed)
    for base, (compression, low_rank, forms) in COMPRESSED.items():
        missing = [form for form in forms if f"{base}{form}" in lacking]
        if missing:
            log.info("making %s", base)
            _make_compressed(load(), folder, base, _content(compression, rank_ratio if low_rank else 0), missing, seed)
    return {name: folder / name for name in wanted if (folder / name).is_dir()}


def _make_uncompressed(dense: LoadedLanguageModel, folder: Path, names: list[str]) -> None:
    for name in names:
        log.info("making %s", name)
        if name in BUILT:
            _whole(folder / name, partial(build_graph, dense, precision=BUILT[name]))
        elif name == NATIVE_INT8:
            write_decoder(dense, folder / DENSE, folder / name, int8=True)
        elif name == DYNAMIC:
            _make_dynamic(folder)
        else:
            _make_llama(dense, folder)


def megabytes(variant: Path) -> float:
    """Size of a variant's weights in megabytes."""
    return ((variant / GGUF).stat().st_size if (variant / GGUF).is_file() else stored_bytes(variant / MODEL)) / 1e6


def _whole(folder: Path, make: Callable[[Path], object]) -> None:
    """Makes a folder beside its place, and moves it there when it is complete."""
    new = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(new, ignore_errors=True)
    make(new)
    new.rename(folder)


def _make_dynamic(folder: Path) -> None:
    dense = folder / DENSE
    if data_file(dense / MODEL).stat().st_size > LARGEST_FILE:
        log.warning("%s is left out: ONNX Runtime's dynamic quantization takes models below 2 GB", DYNAMIC)
        return

    def make(new: Path) -> None:
        shutil.copytree(dense, new, ignore=shutil.ignore_patterns(f"{MODEL}*"))
        quantize(dense / MODEL, new / MODEL)

    _whole(folder / DYNAMIC, make)


def _make_llama(dense: LoadedLanguageModel, folder: Path) -> None:
    kind = type(dense.model).__name__
    if not has_llama_cpp() or kind != "LlamaForCausalLM":
        log.warning("%s is left out: it needs a Llama, and the packages of vitoats[llama-cpp]", LLAMA)
        return

    def make(new: Path) -> None:
        new.mkdir()
        write_gguf(dense.model, new / GGUF)

    _whole(folder / LLAMA, make)


def _content(compression: float, rank_ratio: float) -> Content:
    return of_budget(OATSConfig(compression=compression, rank_ratio=rank_ratio))


def _make_compressed(
    loaded: LoadedLanguageModel, folder: Path, base: str, content: Content, forms: list[str], seed: int
) -> None:
    """Compresses a model at random, in place, and writes it in some forms."""
    model, random = loaded.model, np.random.default_rng(seed)
    for block in decoder_blocks(model):
        for name, module in list(model.get_submodule(block).named_modules(prefix=block)):
            if isinstance(module, nn.Linear):
                shape = LayerShape(module.out_features, module.in_features, 1, 1)
                replace_module(model, name, random_layer(module, shape, content, "row", random))
    graph = folder / f".{base}.graph"
    shutil.rmtree(graph, ignore_errors=True)
    try:
        build_graph(loaded, graph)
        for form in forms:
            write_decoder(loaded, graph, folder / f"{base}{form}", float16=form == "-float16", int8=form == "-int8")
    finally:
        shutil.rmtree(graph, ignore_errors=True)
