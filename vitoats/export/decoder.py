"""A causal language model as an ONNX folder with a key-value cache, for ``vitoats.runtime.decoder`` and ONNX Runtime GenAI.

    model.onnx, model.onnx.data     the graph, with our operators and their functions, and the weights
    genai_config.json               the caches' names and shapes, tokens that end a text, as ONNX Runtime GenAI reads them
    tokenizer.json, ...             the tokenizer
    libvitoats_ops.so               the native library, on request

The model builder of ONNX Runtime GenAI writes the dense graph; compressed layers then take the place of its products.
"""

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch

import vitoats
from vitoats.common.errors import InputError
from vitoats.common.files import whole_folder
from vitoats.common.json_files import read_json, to_json
from vitoats.export.external_data import move_weights
from vitoats.export.functions import add_functions
from vitoats.export.genai_builder import Precision, build, check_buildable
from vitoats.export.int8_layers import int8_layers
from vitoats.export.swap_products import swap_products
from vitoats.format.layers import compressed_counts, compressed_layers, parameter_count
from vitoats.format.operator import LINEAR
from vitoats.loading.language_checkpoint import save_stock_folder
from vitoats.loading.loaded_text import LoadedLanguageModel
from vitoats.models import units
from vitoats.runtime.decoder import CONFIG, MODEL
from vitoats.runtime.inference import METADATA_KEY, data_file
from vitoats.runtime.library import library_path

DecoderForm = Literal["sparse", "dense"]

log = logging.getLogger("vitoats")


def check_decoder(loaded: LoadedLanguageModel, form: DecoderForm, float16: bool, int8: bool, with_library: bool) -> None:
    """Refuses what ``export_decoder`` cannot write, before any work.

    Raises:
        InputError: with the reason.
    """
    model = loaded.model
    check_buildable(model)
    loaded.need_tokenizer()
    if units.kept_units(model):
        raise InputError(f"neurons of {loaded.name} were removed, which the export of language models does not know")
    if int8 and float16:
        raise InputError("int8 weights cannot be written with `float16`: leave that out")
    if form == "dense" and (float16 or int8):
        raise InputError("`form='dense'` has plain weights: leave `float16` and `int8` out")
    if float16 and int8_layers(model):
        raise InputError(f"{loaded.name} has int8 weights, which cannot be written with `float16`: leave that out")
    if with_library and library_path() is None:
        raise InputError("there is no native library to copy: install vitoats with a C++17 compiler at hand")


def export_decoder(
    loaded: LoadedLanguageModel,
    folder: Path,
    form: DecoderForm = "sparse",
    about: dict[str, Any] | None = None,
    float16: bool = False,
    int8: bool = False,
    with_library: bool = False,
    overwrite: bool = False,
) -> onnx.ModelProto:
    """Writes a language model; the folder appears whole or not at all. Meanwhile it takes the disk space of two dense models.

    Args:
        loaded: the model, compressed or not.
        folder: the folder to write.
        form: "sparse" has nodes of our operators; "dense" has the dense weights that compressed layers stand for.
        about: further metadata: method, compression.
        float16: store S, U and V of compressed layers as float16.
        int8: round the weights of all products to int8, with the head, but not the embedding.
        with_library: copy the native library to the folder, where ONNX Runtime GenAI looks for it.
        overwrite: replace an existing folder.

    Returns:
        the model as written, its weights apart.

    Raises:
        InputError: the model cannot be written so.
        RunError: the builder fails, or the folder cannot be written.
    """
    check_decoder(loaded, form, float16, int8, with_library)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        built = build_graph(loaded, Path(scratch) / "graph")
        return write_decoder(loaded, built, folder, form, about, float16, int8, with_library, overwrite)


def build_graph(loaded: LoadedLanguageModel, built: Path, precision: Precision = "fp32") -> Path:
    """Writes the dense model that a model stands for, as the builder does, to the new folder ``built``; returns it."""
    with tempfile.TemporaryDirectory(prefix=f".{built.name}.", dir=built.parent) as scratch:
        stock = Path(scratch) / "stock"
        loaded.read_whole()
        save_stock_folder(loaded, stock)
        log.info("building the graph")
        build(stock, built, precision)
    return built


def write_decoder(
    loaded: LoadedLanguageModel,
    built: Path,
    folder: Path,
    form: DecoderForm = "sparse",
    about: dict[str, Any] | None = None,
    float16: bool = False,
    int8: bool = False,
    with_library: bool = False,
    overwrite: bool = False,
) -> onnx.ModelProto:
    """Writes a language model from its dense graph, which ``build_graph`` wrote; see ``export_decoder``."""
    model = loaded.model
    graph = ir.load(built / MODEL)
    if form == "sparse":
        swap_products(graph, {**compressed_layers(model), **int8_layers(model)}, float16, int8)
    described = {
        "kind": "causal language model",
        "param_count": round(parameter_count(model) / 1e6, 2),
        **compressed_counts(model),
        "form": form,
        "seq_len": loaded.preprocessing.seq_len,
        **(about or {}),
        "versions": {"vitoats": vitoats.__version__, "torch": torch.__version__},
    }
    with whole_folder(folder, overwrite) as partial:
        for file in built.iterdir():
            if file.is_file() and file not in (built / MODEL, data_file(built / MODEL)):
                shutil.copyfile(file, partial / file.name)
        if with_library:
            _add_library(partial)
        return _write(graph, partial / MODEL, described)


def _write(graph: ir.Model, path: Path, described: dict[str, Any]) -> onnx.ModelProto:
    move_weights(graph, path)
    proto = ir.serde.serialize_model(graph)
    add_functions(proto)
    described["sparse_nodes"] = sum(node.op_type in LINEAR for node in proto.graph.node)
    onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(described)})
    path.write_bytes(proto.SerializeToString())
    return proto


def _add_library(folder: Path) -> None:
    """Copies the native library to a folder, and names it in the configuration of ONNX Runtime GenAI."""
    library = library_path()
    assert library is not None
    shutil.copyfile(library, folder / library.name)
    config = read_json(folder / CONFIG)
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = library.name
    (folder / CONFIG).write_text(to_json(config, indent=4))
