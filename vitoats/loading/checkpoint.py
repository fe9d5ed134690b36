"""The folder that ``compress`` writes and ``load`` reads. No pickle anywhere.

    model.safetensors   each compressed layer L as L.S.values [nnz], L.S.mask uint8 [d_out, ceil(d_in / 8)] (format.bitmask),
                        L.U.i, L.V.i, L.bias, and the scales of int8 weights (format.factored); all other weights under their
                        own names
    config.json         timm's configuration: architecture, arguments, preprocessing
    vitoats.json        format_version, method, budget, row blocks and figures of each layer, counts, preprocessing, versions;
                        the number of remaining heads or neurons in each reduced module
    README.md           a model card with the same figures (vitoats.loading.model_card)
    head.safetensors    a linear head, if any (vitoats.loading.head_files)

Format "dense" folds S + U V into plain weights, and timm can open the folder with ``local-dir:``.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitoats
import vitoats.common.torchvision_ops  # (before timm)
from vitoats.common.errors import InputError, one_line
from vitoats.common.files import whole_folder
from vitoats.common.fingerprint import tensors_sha256
from vitoats.common.json_files import read_json, to_json
from vitoats.common.tensor_files import save_tensors
from vitoats.data.transforms import Preprocessing
from vitoats.format import factored
from vitoats.format.counts import count
from vitoats.format.int8_layers import int8_linears
from vitoats.format.layers import compressed_layers, replace_module
from vitoats.loading.head_files import save_head
from vitoats.loading.loaded import LoadedModel
from vitoats.loading.model_card import model_card
from vitoats.loading.sketch import Held, create, sketch
from vitoats.loading.timm_config import CONFIG, TimmConfig, read_config
from vitoats.loading.weights import TensorKind, open_tensors, tensor_kinds
from vitoats.models import units
from vitoats.models.adapter import call_fused_qkv
from vitoats.models.heads import LinearHeadClassifier

import timm  # isort: skip
from timm.models._hub import save_config_for_hf  # isort: skip

FORMAT_VERSION, INT8_VERSION = 1, 2  # of folders without and with int8 weights
WEIGHTS, ABOUT, HEAD, CARD = "model.safetensors", "vitoats.json", "head.safetensors", "README.md"
CHECKSUM = "tensors_sha256"  # key of vitoats.json


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder was written by ``save_checkpoint``."""
    return (folder / ABOUT).is_file()


def save_checkpoint(
    loaded: LoadedModel, folder: Path, about: dict[str, Any], *, dense: bool = False, overwrite: bool = False
) -> None:
    """Writes a compressed model. The write is atomic: the folder appears complete or not at all.

    Args:
        loaded: the compressed model.
        folder: the folder to write.
        about: method, budget and figures for vitoats.json.
        dense: fold every layer into a plain weight matrix.
        overwrite: replace an existing folder.

    Raises:
        InputError: the folder exists and ``overwrite`` is not set; or ``dense`` is set, but heads or neurons were removed,
            and timm has no such model.
        RunError: the folder cannot be written.
    """
    backbone = loaded.timm_model
    if dense and units.kept_units(backbone):
        raise InputError("timm cannot open a model whose heads or neurons were removed: leave `format` out")
    state = dict(backbone.state_dict())
    layers = compressed_layers(backbone)
    for name, layer in (layers | int8_linears(backbone)).items():
        for key in [k for k in state if k.startswith(name + ".")]:
            del state[key]
        state |= dense_tensors(name, layer) if dense else factored.pack(name, layer)
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    about = {
        "format_version": INT8_VERSION if any(v.dtype == torch.int8 for v in state.values()) else FORMAT_VERSION,
        "format": "dense" if dense else "factored",
        **about,
        CHECKSUM: tensors_sha256(state),
        "n_classes": loaded.n_classes,
        "counts": asdict(count(state, not_parameters={name for name, _ in backbone.named_buffers()})),
        "preprocessing": loaded.preprocessing.to_dict(),
        "row_blocks": {} if dense else {name: layer.parts for name, layer in layers.items()},
        "kept_units": units.kept_units(backbone),
        "versions": {"vitoats": vitoats.__version__, "torch": torch.__version__, "timm": timm.__version__},
    }
    data_config = {**loaded.preprocessing.to_dict(), "input_size": loaded.inputs.shape(1)[1:]}
    del data_config["img_size"]
    with whole_folder(folder, overwrite) as partial:
        save_tensors(partial / WEIGHTS, state, {"format": "pt"})
        save_config_for_hf(backbone, str(partial / CONFIG), data_config=data_config)
        (partial / ABOUT).write_text(to_json(about, indent=1))
        (partial / CARD).write_text(model_card(read_json(partial / ABOUT), backbone.pretrained_cfg.get("license")))
        if isinstance(loaded.model, LinearHeadClassifier):
            save_head(partial / HEAD, loaded.model.head.weight.data, loaded.model.head.bias.data, loaded.model.info)


def dense_tensors(name: str, layer: factored.Layer) -> dict[str, torch.Tensor]:
    """The tensors of the dense layer that a compressed layer represents."""
    return {f"{name}.weight": layer.weight.detach()} | ({f"{name}.bias": layer.bias.data} if layer.bias is not None else {})


def load_checkpoint(folder: Path) -> LoadedModel:
    """Loads the backbone of a folder that ``save_checkpoint`` wrote, without its head.

    The described model is compared with the tensors in the file before memory is allocated for it.

    Raises:
        InputError: the files are damaged or do not belong together.
    """
    try:
        about = read_about(folder)
        config = read_config(folder)
        with open_tensors(folder / WEIGHTS) as file:
            model = _build(config, about, file, (folder / WEIGHTS).stat().st_size)
        preprocessing = Preprocessing.from_dict(about["preprocessing"])
    except MemoryError:
        raise
    except Exception as error:  # timm and torch raise many kinds of errors on a mismatch of configuration and tensors
        if isinstance(error, InputError) and str(error).startswith(str(folder)):
            raise
        reason = one_line(error, 200)
        raise InputError(
            f"{folder} is no whole compressed model ({reason}): compress again, or copy the folder again"
        ) from error
    return LoadedModel(str(folder), model.eval().requires_grad_(False), preprocessing, str(folder), about)


def read_about(folder: Path) -> dict[str, Any]:
    """Reads vitoats.json and checks the values that loading relies on."""
    about = read_json(folder / ABOUT)
    if not isinstance(about, dict):
        raise InputError(f"{folder / ABOUT} holds no object")
    if about["format_version"] not in (FORMAT_VERSION, INT8_VERSION):
        version = repr(about["format_version"])[:20]
        raise InputError(f"{folder} has format version {version}, this vitoats reads {INT8_VERSION}: update vitoats")
    if not all(isinstance(about.get(key, ""), str) for key in ("model", "method", "weights", CHECKSUM)):
        raise InputError("a text of vitoats.json is none")
    pairs, kept = [pair for pairs in about["row_blocks"].values() for pair in pairs], about.get("kept_units", {})
    if not all(len(pair) == 2 and all(_is_count(n) for n in pair) for pair in pairs) or not all(map(_is_count, kept.values())):
        raise InputError("the parts or units of vitoats.json are no counts")
    return about


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _build(config: TimmConfig, about: dict[str, Any], file: Any, n_bytes: int) -> nn.Module:
    """Builds the model with its weights: first on the meta device, to compare it with the file, then in full."""
    parts = {name: [(rows, rank) for rows, rank in pairs] for name, pairs in about["row_blocks"].items()}
    found = tensor_kinds(file)
    outline = sketch(config, Held(len(found), n_bytes))
    _prepare(outline, about)
    for name in [key.removesuffix(factored.SCALE) for key in found if key.endswith(factored.SCALE)]:
        parts[name] = [(_linear(outline, name).out_features, 0)]
    compare(expected(outline, parts, found), found)
    state = {name: file.get_tensor(name) for name in found}
    if about.get(CHECKSUM) not in (None, tensors_sha256(state)):
        raise InputError(f"the tensors of {WEIGHTS} are not those whose checksum vitoats.json has")
    model = create(config)
    _prepare(model, about)
    for name, pairs in parts.items():
        linear = units.linear(model, name)
        layer = factored.unpack(name, state, pairs, linear.in_features).to(linear.weight.dtype)
        replace_module(model, name, layer)
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model


def _prepare(model: nn.Module, about: dict[str, Any]) -> None:
    units.resize(model, about.get("kept_units", {}))
    call_fused_qkv(model)


def expected(outline: nn.Module, parts: dict[str, list[tuple[int, int]]], held: Mapping[str, Any]) -> dict[str, TensorKind]:
    """The tensors that the file must hold, by name."""
    expected = {name: TensorKind(tuple(t.shape), t.is_floating_point()) for name, t in outline.state_dict().items()}
    for name, pairs in parts.items():
        linear = _linear(outline, name)
        if len(pairs) > len(held) or linear.out_features != sum(rows for rows, _ in pairs):
            raise InputError(f"{name} has {linear.out_features} rows, its parts in {ABOUT} have others")
        expected = {key: kind for key, kind in expected.items() if not key.startswith(f"{name}.")}
        kinds = factored.kinds(name, held.keys(), pairs, linear.in_features)
        expected |= {key: TensorKind(kind.shape, kind.floating) for key, kind in kinds.items()}
    return expected


def _linear(outline: nn.Module, name: str) -> nn.Linear:
    linear = outline.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise InputError(f"{name} is no linear layer")
    return linear


def compare(expected: Mapping[str, TensorKind], held: Mapping[str, TensorKind]) -> None:
    """Raises InputError if a file's tensors differ from the expected ones."""
    different = expected.keys() ^ held.keys()
    if different:
        name = min(different)
        raise InputError(f"{WEIGHTS} {'lacks' if name in expected else 'has one tensor too many,'} {name}")
    for name, (shape, floating) in expected.items():
        if not factored.same_shape(held[name].shape, shape):
            raise InputError(f"{name} has the shape {list(held[name].shape)}, not {list(shape)}")
        if held[name].floating != floating:
            raise InputError(f"{name} holds numbers of another type")


def about(folder: Path) -> dict[str, Any]:
    """The content of a compressed model's vitoats.json."""
    return read_json(folder / ABOUT)
