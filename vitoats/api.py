"""The Python API: the command line's functions, with the same setting names and the same results.

Nothing is printed. Progress is reported to the callback ``progress``, messages go to the logger "vitoats"; both are off unless
the caller turns them on.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import Dataset

from vitoats.common.devices import check_device, set_threads
from vitoats.common.errors import InputError
from vitoats.common.outputs import check_output_file, check_output_folder
from vitoats.common.progress import Progress, silent
from vitoats.common.sizes import ImageSize
from vitoats.compression.run import Compressed, run
from vitoats.compression.settings import METHOD, make_job
from vitoats.data.in_memory import ImagesInMemory
from vitoats.evaluation.accuracy import Accuracy
from vitoats.evaluation.protocol import Protocol, open_test_set
from vitoats.evaluation.target import Target, onnx_target, torch_target
from vitoats.export.decoder import export_decoder
from vitoats.export.onnx_file import Form, described_by
from vitoats.export.onnx_file import export_onnx as write_onnx
from vitoats.loading.language_models import is_language_model, language_model_in_memory, load_language_model
from vitoats.loading.load import from_memory, load_model
from vitoats.loading.loaded import LoadedModel
from vitoats.loading.loaded_text import LoadedLanguageModel
from vitoats.runtime.decoder import CONFIG

Model = str | Path | nn.Module | LoadedModel | Compressed
IN_MEMORY = "given in memory"


@torch.inference_mode(mode=False)  # budgets of language models need gradients
def compress(
    model: str | Path | nn.Module,
    images: Any = None,
    *,
    method: str = METHOD,
    preset: Literal["fast"] | None = None,
    compression: float | None = None,
    speedup: float | None = None,
    max_ms: float | None = None,
    max_mb: float | None = None,
    cost_table: Path | None = None,
    rank_ratio: float | None = None,
    iterations: int | None = None,
    pattern: str | None = None,
    solver: str | None = None,
    tolerance: float | None = None,
    target: Literal["block", "sequential", "dense", "residual"] | None = None,
    refit_bias: bool | None = None,
    allocation: Literal["uniform", "owl", "sensitivity"] | None = None,
    calibration_mix: Literal["none", "synthetic", "general", "both"] | None = None,
    general_images: str | None = None,
    amp: bool = False,
    fused_qkv: bool = False,
    weights: Literal["float32", "int8"] = "float32",
    nsamples: int | None = None,
    seed: int = 42,
    checkpoint: Path | None = None,
    random_weights: bool = False,
    img_size: ImageSize | None = None,
    crop_mode: str | None = None,
    pos_resample: str | None = None,
    head: Path | None = None,
    head_layers: int | None = None,
    seq_len: int | None = None,
    tokenizer: Any = None,
    head_name: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    device: str = "cpu",
    threads: int = 0,
    memory_limit: float | None = None,
    scratch: Path | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Compressed:
    """Compresses a model as ``tools/compress.py`` does: the same seed and settings give the same folder.

    The preset or the method decides settings that are None. docs/methods.md describes each setting.

    Args:
        model: a timm model or a causal language model of transformers in memory, which is not modified; or a name or folder, as
            ``--model`` takes it.
        images: a folder; a dataset of PIL images or preprocessed tensors [3, size, size], or of tuples that begin with one; or
            a float tensor [n, 3, size, size] (or [n, channels, height, width]). For a language model: a file or folder of text,
            a list of ``Path``s of these, or a list of texts. The embedded models come with their own.
        method, preset: "oats-h" is the default method; the preset "fast" is quicker.
        compression: share of the weights to remove. Instead of it, give one of the next three:
        speedup: speedup of the exported model over the dense one on this machine,
        max_ms: largest latency of the exported model, in milliseconds,
        max_mb: largest size of the exported file, in 10^6 bytes.
        cost_table: a cost table measured on another machine (``tools/benchmark.py op --model``).
        rank_ratio, iterations, pattern, solver, tolerance, options: settings of the method's config.
        target, refit_bias, allocation, calibration_mix, general_images, fused_qkv: how the method is applied to the model.
        amp: run the model under autocast to bfloat16 while calibrating; solvers stay in float32 and float64.
        weights: "int8" rounds the weights of compressed layers to int8; these layers also quantize their inputs.
        nsamples, seed: number of calibration images, or windows of text, and the seed that draws them.
        seq_len: tokens of a window of text.
        tokenizer: the transformers tokenizer of a language model in memory.
        checkpoint, random_weights, pos_resample, head, head_layers, head_name, model_kwargs: how a model is loaded by name.
        img_size, crop_mode, mean, std, interpolation, crop_pct: preprocessing of the images.
        batch_size, workers, device, threads, memory_limit (GB): resources.
        scratch: folder for the hidden states if they exceed the memory limit.
        progress: called with the stage, steps done, steps in total, and a description of the current step.

    Returns:
        the compressed model: ``.model`` is a torch module, ``.save(folder)`` writes a folder that ``vitoats.load`` opens.

    Raises:
        InputError: the model, the images or the settings are invalid; ``field`` names the argument.
        RunError: memory or disk space runs out.
    """
    given = {name: value for name, value in locals().items() if name in _DECIDED and value is not None}
    preprocessing = {"mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct}
    loaded: LoadedModel | LoadedLanguageModel | None = None
    if batch_size is not None:
        given["batch_size"] = batch_size
    language = isinstance(model, nn.Module) and hasattr(model, "get_output_embeddings")
    if language:
        loaded = language_model_in_memory(model, tokenizer, seq_len=seq_len)
    elif isinstance(model, nn.Module):
        loaded = from_memory(model, img_size=img_size)
        loaded.preprocessing = loaded.preprocessing.changed(crop_mode, preprocessing)
    else:
        given |= {"checkpoint": checkpoint, "random_weights": random_weights, "pos_resample": pos_resample}
        given |= {"head": head, "head_layers": head_layers, "head_name": head_name, "model_kwargs": model_kwargs}
    if isinstance(images, Sequence) and not isinstance(images, str) and all(isinstance(x, Path) for x in images):
        files: Any = [str(path) for path in images]
    else:
        files = str(images) if isinstance(images, (str, Path)) else None
    in_memory = images is not None and files is None
    job = make_job(
        str(model) if loaded is None else loaded.name,
        IN_MEMORY if in_memory else files,
        text=language or None,
        **given,
        seq_len=seq_len,
        **preprocessing,
        img_size=img_size,
        crop_mode=crop_mode,
        amp=amp,
        fused_qkv=fused_qkv,
        weights=weights,
        seed=seed,
        workers=workers,
        device=device,
        threads=threads,
        memory_limit=memory_limit,
        **options,
    )
    return run(job, loaded=loaded, images=images if in_memory else None, scratch=scratch, progress=progress)


_DECIDED = (  # settings that the preset or the method decides if they are None
    *("method", "preset", "compression", "speedup", "max_ms", "max_mb", "cost_table", "rank_ratio", "iterations", "pattern"),
    *("solver", "tolerance", "target", "refit_bias", "allocation", "calibration_mix", "general_images", "nsamples"),
)


def export_onnx(
    model: Model,
    output: str | Path,
    *,
    form: Form = "sparse",
    float16: bool = False,
    int8: bool = False,
    features: str | None = None,
    dynamic_img_size: bool = False,
    external_data: bool = False,
    overwrite: bool = False,
) -> Path:
    """Writes a model as ONNX, as ``tools/export_onnx.py`` does.

    Args:
        model: the result of ``compress``, a folder saved from it, or any other model, compressed or not.
        output: the .onnx file; a folder for a language model, which has the forms "sparse" and "dense".
        form: "sparse"; "matmul" has low-rank terms as separate nodes, "inline" standard operators only, "dense" S + U V.
        float16: store S, U and V as float16.
        int8: round the weights of compressed layers to int8, or those of all blocks of a dense model.
        features: tokens as outputs instead of logits: "cls", "patches", "all", "layers=4" or "layers=2,5,8,11".
        dynamic_img_size: leave height and width of images free, multiples of the patch size; positions are interpolated.
        external_data: write the weights to a second file, ``output`` with .data at its end; always so above 2 GB.
        overwrite: replace the file if it exists.

    Raises:
        InputError: the model cannot be exported in this form.
        RunError: the file cannot be written.
    """
    if (language := _language_model(model)) is not None:
        if form == "matmul" or form == "inline":
            raise InputError(f"a language model has no form {form!r}: give `form` 'sparse' or 'dense'", "form")
        if features is not None or dynamic_img_size:
            raise InputError(f"`{'features' if features else 'dynamic_img_size'}` is for vision models: leave it out")
        check_output_folder(Path(output), overwrite, CONFIG, "export_onnx")
        about = described_by(language.about, language.name)
        export_decoder(language, Path(output), form, about, float16, int8, overwrite=overwrite)
        return Path(output)
    check_output_file(Path(output), overwrite)
    loaded, about = _opened(model)
    if features is not None:
        loaded = loaded.with_features(features)
    if dynamic_img_size:
        loaded = loaded.with_free_size()
    write_onnx(loaded, Path(output), form, described_by(about, loaded.name), float16, int8, external_data)
    return Path(output)


def evaluate(
    model: Model,
    images: str | Path | Dataset | None = None,
    *,
    split: str = "validation",
    num_samples: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
    threads: int = 0,
    progress: Callable[[Accuracy], None] = lambda _: None,
) -> Accuracy:
    """Top-1 and top-5 of a model or an .onnx file on labelled images, as ``tools/eval_imagenet.py`` measures them.

    Args:
        model: an .onnx file, the result of ``compress``, a folder saved from it, or any other model with a classifier.
        images: a folder with one subfolder per class; or a dataset of (PIL image or preprocessed tensor, label). The embedded
            model comes with its own test set.
        split: which split of the folder.
        num_samples: number of images, evenly spaced; None for all.
        batch_size, workers, device, threads: as for ``compress``.
        progress: called with the counts after each batch.

    Raises:
        InputError: the model has no classifier, or the images do not match it.
    """
    set_threads(threads)
    target = _target(model, device, threads)
    if images is not None and not isinstance(images, (str, Path)):
        images = ImagesInMemory(images, target.preprocessing)
    protocol = Protocol(
        images=str(images) if isinstance(images, Path) else images,
        split=split,
        num_samples=num_samples,
        batch_size=batch_size,
        workers=workers,
    )
    return open_test_set(protocol, target, target.preprocessing).evaluate(target, progress)


def _target(model: Model, device: str, threads: int) -> Target:
    if isinstance(model, (str, Path)) and str(model).endswith(".onnx"):
        return onnx_target(str(model), threads)
    return torch_target(_opened(model)[0], check_device(device))


def _language_model(model: Model) -> LoadedLanguageModel | None:
    """A model, if it is a language model."""
    if isinstance(model, (str, Path)) and is_language_model(str(model)):
        return load_language_model(str(model))
    loaded = model.loaded if isinstance(model, Compressed) else model
    return loaded if isinstance(loaded, LoadedLanguageModel) else None


def _opened(model: Model) -> tuple[LoadedModel, dict[str, Any]]:
    """A model with its preprocessing, and the content of its vitoats.json."""
    if isinstance(model, Compressed):
        return model.vision_model, model.about
    if isinstance(model, LoadedModel):
        return model, model.about
    loaded = from_memory(model) if isinstance(model, nn.Module) else load_model(str(model))
    return loaded, loaded.about
