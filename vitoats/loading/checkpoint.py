"""The folder that ``compress`` writes and ``load`` reads. No pickle anywhere.

    model.safetensors   each compressed layer L as L.S.values [nnz], L.S.mask uint8 [d_out, ceil(d_in / 8)] (format.bitmask),
                        L.U.i, L.V.i, L.bias; all other weights under their own names
    config.json         timm's: architecture, arguments, preprocessing
    vitoats.json        format_version, method, budget, row blocks and figures of each layer, counts, preprocessing, versions;
                        how many heads or neurons are left in each module that lost some
    README.md           a model card of the same figures (vitoats.loading.model_card)
    head.safetensors    a linear head, where there is one (vitoats.models.heads)

Format "dense" folds S + U V into plain weights: timm opens that folder by ``local-dir:``.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

import vitoats
import vitoats.common.torchvision_ops  # (before timm)
from vitoats.common.errors import InputError, RunError
from vitoats.common.files import save_tensors
from vitoats.data.transforms import Preprocessing
from vitoats.format import bitmask
from vitoats.format.counts import count
from vitoats.format.layers import SparseLowRankLinear, compressed_layers, replace_module
from vitoats.loading.load import LoadedModel
from vitoats.loading.model_card import model_card
from vitoats.loading.weights import read_json
from vitoats.models.adapter import call_fused_qkv
from vitoats.models.heads import LinearHeadClassifier, save_head
from vitoats.models.units import kept_units, resize

import timm  # isort: skip
from timm.models._hub import load_model_config_from_path, save_config_for_hf  # isort: skip

FORMAT_VERSION = 1
WEIGHTS, CONFIG, ABOUT, HEAD, CARD = "model.safetensors", "config.json", "vitoats.json", "head.safetensors", "README.md"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder was written by ``save_checkpoint``."""
    return (folder / ABOUT).is_file()


def save_checkpoint(
    loaded: LoadedModel, folder: Path, about: dict[str, Any], *, dense: bool = False, overwrite: bool = False
) -> None:
    """Writes a compressed model; the folder appears whole or not at all.

    Args:
        loaded: the compressed model.
        folder: where to; must not exist unless ``overwrite``.
        about: method, budget and figures for vitoats.json.
        dense: fold every layer to a plain weight.
        overwrite: replace a folder that is there.

    Raises:
        InputError: ``dense`` was asked for, but no plain timm model has what is left of its heads and neurons.
        RunError: it cannot be written.
    """
    backbone = loaded.timm_model
    if dense and kept_units(backbone):
        raise InputError("timm cannot open a model whose heads or neurons were removed: leave `format` out")
    state = dict(backbone.state_dict())
    layers = compressed_layers(backbone)
    for name, layer in layers.items():
        for key in [k for k in state if k.startswith(name + ".")]:
            del state[key]
        state |= dense_tensors(name, layer) if dense else factored_tensors(name, layer)
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    about = {
        "format_version": FORMAT_VERSION,
        "format": "dense" if dense else "factored",
        **about,
        "n_classes": loaded.n_classes,
        "counts": asdict(count(state, not_parameters={name for name, _ in backbone.named_buffers()})),
        "preprocessing": loaded.preprocessing.to_dict(),
        "row_blocks": {} if dense else {name: layer.parts for name, layer in layers.items()},
        "kept_units": kept_units(backbone),
        "versions": {"vitoats": vitoats.__version__, "torch": torch.__version__, "timm": timm.__version__},
    }
    size = loaded.preprocessing.img_size
    data_config = {**loaded.preprocessing.to_dict(), "input_size": (3, size, size)}
    del data_config["img_size"]
    with whole_folder(folder, overwrite) as partial:
        save_tensors(partial / WEIGHTS, state, {"format": "pt"})
        save_config_for_hf(backbone, str(partial / CONFIG), data_config=data_config)
        (partial / ABOUT).write_text(json.dumps(about, indent=1))
        (partial / CARD).write_text(model_card(read_json(partial / ABOUT), backbone.pretrained_cfg.get("license")))
        if isinstance(loaded.model, LinearHeadClassifier):
            save_head(partial / HEAD, loaded.model.head.weight.data, loaded.model.head.bias.data, loaded.model.info)


def factored_tensors(name: str, layer: SparseLowRankLinear) -> dict[str, torch.Tensor]:
    """The tensors of one compressed layer, S as values and bit mask."""
    values, mask = bitmask.pack(layer.S.detach().cpu().numpy())
    tensors = {f"{name}.S.values": torch.from_numpy(values), f"{name}.S.mask": torch.from_numpy(mask)}
    for i, (u, v) in enumerate(zip(layer.U, layer.V, strict=True)):
        tensors |= {f"{name}.U.{i}": u.data, f"{name}.V.{i}": v.data}
    return tensors | ({f"{name}.bias": layer.bias.data} if layer.bias is not None else {})


def dense_tensors(name: str, layer: SparseLowRankLinear) -> dict[str, torch.Tensor]:
    """The tensors of the dense layer it stands for."""
    return {f"{name}.weight": layer.weight.detach()} | ({f"{name}.bias": layer.bias.data} if layer.bias is not None else {})


@contextlib.contextmanager
def whole_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a hidden folder beside ``folder`` to write to, and moves it into place if all went well.

    Raises:
        RunError: something could not be written; nothing is left behind.
    """
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.writing-"))
        yield partial
        for file in partial.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        partial.chmod(0o755)
        if overwrite and folder.exists():
            old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old-"))
            os.rename(folder, old / "old")
            os.rename(partial, folder)
            shutil.rmtree(old)
        else:
            os.rename(partial, folder)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{folder} cannot be written ({reason}): free some space or give another `output`") from None
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def load(folder: str | Path) -> nn.Module:
    """Loads a compressed model in one call: images [batch, 3, h, w] to logits, or to features where there is no head.

    Args:
        folder: that compress wrote, or hf-hub:owner/name where it lies on the Hub.

    Raises:
        InputError: no such folder, or its files do not belong together.
    """
    from vitoats.loading.load import load_model

    on_hub = str(folder).startswith("hf-hub:")
    return load_model(str(folder) if on_hub else str(Path(folder).resolve())).model


def load_checkpoint(folder: Path) -> LoadedModel:
    """Loads the backbone of a folder that ``save_checkpoint`` wrote, without its head."""
    try:
        about = read_json(folder / ABOUT)
        if about["format_version"] != FORMAT_VERSION:
            raise InputError(
                f"{folder} has format version {about['format_version']}, this vitoats reads {FORMAT_VERSION}: update vitoats"
            )
        pretrained_cfg, architecture, model_args = load_model_config_from_path(folder)
        state = safetensors.torch.load_file(str(folder / WEIGHTS))
        model = timm.create_model(architecture, pretrained_cfg=pretrained_cfg, **model_args)
        resize(model, about.get("kept_units", {}))
        call_fused_qkv(model)
        for name, row_blocks in about["row_blocks"].items():
            linear = model.get_submodule(name)
            values, mask = state.pop(f"{name}.S.values").numpy(), state.pop(f"{name}.S.mask").numpy()
            blocks = [(int(rows), int(rank)) for rows, rank in row_blocks]
            layer = SparseLowRankLinear.empty(blocks, linear.in_features, f"{name}.bias" in state, linear.weight.dtype)
            state[f"{name}.S"] = torch.from_numpy(bitmask.unpack(values, mask, linear.in_features))
            replace_module(model, name, layer)
        model.load_state_dict(state, strict=True)
        preprocessing = Preprocessing.from_dict(about["preprocessing"])
    except InputError:
        raise
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        safetensors.SafetensorError,
    ) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{folder} is no whole compressed model ({reason}): compress again, or copy the folder again"
        ) from None
    return LoadedModel(str(folder), model.eval().requires_grad_(False), preprocessing, str(folder), about)


def about(folder: Path) -> dict[str, Any]:
    """What vitoats.json says of a compressed model."""
    return read_json(folder / ABOUT)
