"""The folder of a compressed language model. No pickle anywhere.

    model.safetensors     as in ``loading.checkpoint``; tied weights are stored once; above 5 GB several files with an index
    config.json           transformers' configuration, and generation_config.json
    tokenizer.json, ...   the tokenizer, as transformers saves it
    vitoats.json          as in ``loading.checkpoint``
    README.md             a model card

Format "dense" folds S + U V into plain weights, and stock transformers opens the folder.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitoats
from vitoats.common.errors import InputError, one_line
from vitoats.common.files import whole_folder
from vitoats.common.fingerprint import tensors_sha256
from vitoats.common.json_files import read_json, to_json
from vitoats.common.tensor_files import save_tensors
from vitoats.format import factored
from vitoats.format.counts import count
from vitoats.format.int8_layers import Int8SparseLowRankLinear, int8_linears
from vitoats.format.layers import compressed_layers, replace_module
from vitoats.loading.checkpoint import (
    ABOUT,
    CARD,
    CHECKSUM,
    FORMAT_VERSION,
    INT8_VERSION,
    WEIGHTS,
    compare,
    dense_tensors,
    expected,
    read_about,
)
from vitoats.loading.loaded_text import LoadedLanguageModel, untied_state
from vitoats.loading.model_card import model_card
from vitoats.loading.shards import INDEX, tensor_files
from vitoats.loading.sketch import Held, no_more_than
from vitoats.loading.timm_config import CONFIG
from vitoats.loading.weights import TensorKind, open_tensors, tensor_kinds
from vitoats.models import units
from vitoats.models.causal_lm import call_linears, conv1d_names

SHARD_BYTES = 5 * 10**9


def save_language_checkpoint(
    loaded: LoadedLanguageModel, folder: Path, about: dict[str, Any], *, dense: bool = False, overwrite: bool = False
) -> None:
    """Writes a compressed language model. The write is atomic: the folder appears complete or not at all.

    Args:
        loaded: the compressed model.
        folder: the folder to write.
        about: method, budget and figures for vitoats.json.
        dense: fold every layer into a plain weight matrix.
        overwrite: replace an existing folder.

    Raises:
        InputError: the folder exists and ``overwrite`` is not set; or ``dense`` is set, but blocks keep different numbers of
            key-value groups or neurons.
        RunError: the folder cannot be written.
    """
    import transformers

    model = loaded.model
    layers, state = compressed_layers(model), _tensors(loaded, dense)
    config = _reduced_config(model, state) if dense and units.kept_units(model) else model.config
    int8 = bool(int8_linears(model)) or any(isinstance(layer, Int8SparseLowRankLinear) for layer in layers.values())
    about = {
        "format_version": INT8_VERSION if int8 and not dense else FORMAT_VERSION,
        "format": "dense" if dense else "factored",
        "kind": "causal language model",
        **about,
        CHECKSUM: tensors_sha256(state),
        "counts": asdict(count(state, not_parameters={name for name, _ in model.named_buffers()})),
        "preprocessing": loaded.preprocessing.to_dict(),
        "row_blocks": {} if dense else {name: layer.parts for name, layer in layers.items()},
        "kept_units": {} if dense else units.kept_units(model),
        "versions": {"vitoats": vitoats.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    with whole_folder(folder, overwrite) as partial:
        _write(loaded, partial, state, config)
        (partial / ABOUT).write_text(to_json(about, indent=1))
        (partial / CARD).write_text(model_card(read_json(partial / ABOUT), None))


def save_stock_folder(loaded: LoadedLanguageModel, folder: Path) -> None:
    """Writes a model in float32 as stock transformers opens it, every layer folded, and nothing of ours, to a new folder.

    Raises:
        InputError: neurons or key-value groups were removed.
    """
    if units.kept_units(loaded.model):
        raise InputError(f"neurons of {loaded.name} were removed, which only vitoats.load opens: use another method")
    folder.mkdir()
    _write(loaded, folder, _tensors(replace(loaded, types={}), dense=True), loaded.model.config)


def _write(loaded: LoadedLanguageModel, folder: Path, state: Mapping[str, Tensor], config: Any) -> None:
    """Writes the weights, and the configuration and the tokenizer as transformers does."""
    model = loaded.model
    _save_sharded(folder, state)
    config.architectures = [type(model).__name__]
    config.save_pretrained(str(folder))
    if model.can_generate():
        model.generation_config.save_pretrained(str(folder))
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(str(folder))


def _tensors(loaded: LoadedLanguageModel, dense: bool) -> Mapping[str, Tensor]:
    """The tensors of the folder, tied ones once; of a model on disk, those of one block at a time are in memory."""
    model, types = loaded.model, loaded.types
    transposed = {f"{name}.weight" for name in conv1d_names(_sketch(model.config))} if dense else set()

    def write(name: str, value: Tensor | factored.Layer) -> dict[str, Tensor]:
        if isinstance(value, Tensor):
            found = {name: value.to(types.get(name, value.dtype))}
        elif dense:
            found = {key: tensor.to(types.get(key, tensor.dtype)) for key, tensor in dense_tensors(name, value).items()}
        else:
            found = factored.pack(name, value, types.get(f"{name}.weight"))
        return {key: (x.T if key in transposed else x).detach().cpu().contiguous() for key, x in found.items()}

    if loaded.disk:
        return loaded.disk.written(write)
    layers: dict[str, factored.Layer] = {**compressed_layers(model), **int8_linears(model)}
    inside = tuple(f"{name}." for name in layers)
    plain = {key: value for key, value in untied_state(model).items() if not key.startswith(inside)}
    return {key: x for name, value in (plain | layers).items() for key, x in write(name, value).items()}


def _reduced_config(model: Any, state: Mapping[str, Tensor]) -> Any:
    """The configuration of a model from which as many key-value groups and neurons were removed in each block.

    Args:
        model: the model.
        state: the tensors that stock transformers is to find.

    Raises:
        InputError: no configuration describes what is left.
    """
    config = copy.copy(model.config)
    for name, kept in units.kept_units(model).items():
        module = model.get_submodule(name)
        if hasattr(module, "num_key_value_groups"):
            config = units.grouped_config(config, kept, module)
        else:
            setattr(config, next(key for key in ("intermediate_size", "ffn_dim", "n_inner") if hasattr(config, key)), kept)
    expected = untied_state(_sketch(config))
    if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in expected.items()}:
        raise InputError(
            "transformers cannot open a model whose blocks keep different numbers of key-value groups or neurons: "
            "leave `format` out, or use `cut='equal'`"
        )
    return config


def _save_sharded(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Writes one file, or several of at most ``SHARD_BYTES`` with transformers' index; one of them at a time is in memory."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total, size = 0, 0

    def write() -> None:
        shards.append(list(shard))
        save_tensors(folder / f"{len(shards)}", shard, {"format": "pt"})
        shard.clear()

    for name, tensor in state.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            write()
            size = 0
        shard[name] = tensor
        total, size = total + tensor.nbytes, size + tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / "1").rename(folder / WEIGHTS)
        return
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for i, name in enumerate(names, 1):
        (folder / f"{i}").rename(folder / name)
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    (folder / INDEX).write_text(to_json({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))


def load_compressed(folder: Path, config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Loads the model of a folder that ``save_language_checkpoint`` wrote.

    The described model is compared with the tensors in the files before memory is allocated for it.

    Args:
        folder: the folder.
        config: its transformers configuration.

    Returns:
        the model, and the content of vitoats.json.

    Raises:
        InputError: the files are damaged or do not belong together.
    """
    try:
        about = read_about(folder)
        return _build(folder, config, about), about
    except MemoryError:
        raise
    except Exception as error:  # transformers and torch raise many kinds of errors on a mismatch of configuration and tensors
        if isinstance(error, InputError) and str(error).startswith(str(folder)):
            raise
        raise InputError(f"{folder} is damaged ({one_line(error, 200)}): copy or make the folder again") from None


def _build(folder: Path, config: Any, about: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    files = tensor_files(folder)
    held: dict[str, TensorKind] = {}
    state: dict[str, Tensor] = {}
    for path in files:
        with open_tensors(path) as file:
            held |= tensor_kinds(file)
    n_bytes = sum(path.stat().st_size for path in files)
    with no_more_than(Held(len(held), n_bytes), folder / CONFIG):
        outline = _sketch(config)
    if about["format"] != "dense":  # a dense folder holds what stock transformers expects
        call_linears(outline)
    units.resize(outline, about.get("kept_units", {}))
    parts = {name: [(rows, rank) for rows, rank in pairs] for name, pairs in about["row_blocks"].items()}
    for name in [key.removesuffix(factored.SCALE) for key in held if key.endswith(factored.SCALE)]:
        parts[name] = [(units.linear(outline, name).out_features, 0)]
    wanted = expected(outline, parts, held)
    compare({name: kind for name, kind in wanted.items() if name not in set(outline.all_tied_weights_keys)}, held)
    for path in files:
        with open_tensors(path) as file:
            state |= {name: file.get_tensor(name) for name in list(file.keys())}
    if about.get(CHECKSUM) not in (None, tensors_sha256(state)):
        raise InputError(f"the tensors of {WEIGHTS} are not those whose checksum vitoats.json has")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if about["format"] != "dense":
        call_linears(model)
    units.resize(model, about.get("kept_units", {}))
    for name, pairs in parts.items():
        layer = factored.unpack(name, state, pairs, units.linear(model, name).in_features).float()
        replace_module(model, name, layer)
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    lacking = model.load_state_dict(state, strict=False)
    if lacking.unexpected_keys or set(lacking.missing_keys) - set(model.all_tied_weights_keys):
        raise InputError(f"the tensors are not those of a {type(model).__name__}")
    model.tie_weights()
    return model


def _sketch(config: Any) -> Any:
    """The dense model on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)  # which writes the type to it
