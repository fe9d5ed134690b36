"""Turns named settings, given as flags or keyword arguments, into a ``CompressionJob``.

Settings that are not given come from the preset, then from the method. Contradictions are refused here, before anything is
loaded.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import vitoats.methods  # noqa: F401  (fills the table of methods)
from vitoats.common.errors import InputError
from vitoats.compression.job import CalibrationData, CalibrationText, CompressionJob, CostLimit, ModelSource, Resources
from vitoats.data.images import SAMPLE
from vitoats.loading.language_models import HUB, is_language_model
from vitoats.loading.names import EMBEDDED
from vitoats.loading.smollm2 import NAME as EMBEDDED_LANGUAGE_MODEL
from vitoats.methods.registry import Method, Recipe, StructuralMethod, find_method

CONFIG_SETTINGS = ("compression", "rank_ratio", "iterations", "pattern", "solver", "tolerance")
RECIPE_SETTINGS = ("target", "refit_bias", "allocation", "calibration_mix", "amp")
LIMITS = ("speedup", "max_ms", "max_mb")
MODEL_SETTINGS = tuple(field.name for field in dataclasses.fields(ModelSource) if field.name != "name")
RESOURCES = tuple(field.name for field in dataclasses.fields(Resources))
METHOD = "oats-h"
PRESETS: dict[str, dict[str, dict[str, Any]]] = {  # by method and name: values of settings that are not given
    "oats-h": {"fast": {"solver": "support", "iterations": 20, "allocation": "uniform", "nsamples": 128}},
}
# damping if a method that mixes in images by default is called without a mix; found by trial: docs/oats-h.md, Constants
CLOSED_DOMAIN_DAMPING = 0.1
BATCH_SIZE, TEXT_BATCH_SIZE = 64, 4  # images, and windows of text, at a time
# settings of a language model's methods where they differ from those of vision models, by method
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {"oats": {"rank_ratio": 0.25}}
# settings with int8 weights where they differ from those with others: there a low-rank term costs time and gains nothing
INT8_DEFAULTS: dict[str, dict[str, Any]] = {"oats-h": {"rank_ratio": 0.0}}
FOR_IMAGES = ("general_images", *LIMITS, "cost_table", *MODEL_SETTINGS)  # settings that a language model does not take


def make_job(
    model: str, images: str | Sequence[str] | None = None, text: bool | None = None, **settings: Any
) -> CompressionJob:
    """Makes a job.

    Args:
        model: a name or folder, as ``loading.load.load_model`` or ``loading.language_models`` takes it.
        images: a folder of images, or files or folders of text for a language model; None uses the embedded sample, with the
            embedded models only.
        text: whether it is a language model; None finds out by the name.
        settings: any of method, preset, seed, nsamples, general_images, fused_qkv, weights, cost_table,
            ``CONFIG_SETTINGS``, ``RECIPE_SETTINGS``, one of ``LIMITS``, ``MODEL_SETTINGS``, ``RESOURCES``, and other fields of
            the method's config.

    Raises:
        InputError: the method or a setting is unknown, or settings contradict each other.
    """
    if images is None and model in (EMBEDDED, EMBEDDED_LANGUAGE_MODEL):
        images = SAMPLE
    text = is_language_model(model, look_at_hub=True) if text is None else text
    name, seed = settings.pop("method", METHOD), settings.pop("seed", 42)
    resources = {"batch_size": TEXT_BATCH_SIZE if text else BATCH_SIZE} | _taken(settings, RESOURCES)
    if text:
        settings = _for_text(name, model, settings)
        if images is None:
            raise InputError("there is no text to calibrate on: give `images` a file or folder of text, or 'sample'")
    source, seq_len = _taken(settings, MODEL_SETTINGS), settings.pop("seq_len", None)
    if seq_len is not None and not text:
        if model.startswith(HUB):  # which may be one that cannot be reached
            raise InputError(
                f"{model} is no language model, or the Hub cannot be reached: leave `seq_len` out, or give `model` a "
                "transformers folder, local-dir:PATH"
            )
        raise InputError(f"`seq_len` is for language models, and {model} is none: leave it out")
    own = _method_fields(name, images if isinstance(images, str) or images is None or text else _one(images), seed, settings)
    if text:
        data = own["data"]
        texts = (images,) if isinstance(images, str) else tuple(images or ())
        own["data"] = CalibrationText(texts=texts, seq_len=seq_len, nsamples=data.nsamples, seed=seed)
    return CompressionJob(model=ModelSource(name=model, **source), resources=Resources(**resources), **own)


def _for_text(method: str, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for a language model, with defaults that differ from those of vision models.

    Raises:
        InputError: a setting is for vision models only.
    """
    for setting in FOR_IMAGES:
        if settings.get(setting):
            raise InputError(f"`{setting}` is for vision models, and {model} is a language model: leave it out")
    if settings.get("calibration_mix", "none") != "none":
        raise InputError("`calibration_mix` mixes in images: leave it out, and give `images` several texts")
    settings = {key: value for key, value in settings.items() if key not in FOR_IMAGES}
    return {"nsamples": CalibrationText.nsamples, "calibration_mix": "none"} | TEXT_DEFAULTS.get(method, {}) | settings


def _one(images: Sequence[str]) -> str:
    """The only folder of images.

    Raises:
        InputError: there are several.
    """
    if len(images) != 1:
        raise InputError(f"{len(images)} folders are given: give `images` one, and `general_images` another to mix in")
    return images[0]


def with_method(job: CompressionJob, name: str, **settings: Any) -> CompressionJob:
    """The same job with another method: model, images and resources stay, the rest is as for ``make_job``.

    Args:
        job: the job.
        name: the other method's name.
        settings: as for ``make_job``, without ``MODEL_SETTINGS`` and seed.

    Raises:
        InputError: as for ``make_job``.
    """
    data = job.image_data
    settings = {"nsamples": data.nsamples, "general_images": data.general_images} | settings
    resources = dataclasses.replace(job.resources, **_taken(settings, RESOURCES))
    return dataclasses.replace(job, resources=resources, **_method_fields(name, data.images, data.seed, settings))


def _method_fields(name: str, images: str | Sequence[str] | None, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job that a method and its settings decide."""
    method = find_method(name)
    preset = settings.pop("preset", None)
    if preset is not None and preset not in PRESETS.get(name, {}):
        raise InputError(
            f"the method {name} has no preset {preset!r}: leave `preset` out, or use `method='{METHOD}'`", field="preset"
        )
    if isinstance(method, StructuralMethod):
        _refuse_layer_settings(name, settings)
    if images is None:
        raise InputError("there are no images to calibrate on: give `images` a folder of images")
    given = (PRESETS[name][preset] if preset else {}) | settings
    if given.get("weights") == "int8" and given.get("solver") != "support":  # which takes the support from the low-rank solver
        given = INT8_DEFAULTS.get(name, {}) | given
    general_images = given.pop("general_images", None)
    nsamples = given.pop("nsamples", CalibrationData.nsamples)
    own_images = images if isinstance(images, str) else "text"
    recipe = _recipe(method, _taken(given, RECIPE_SETTINGS), general_images)
    if "compression" in settings and (asked := [limit for limit in LIMITS if limit in settings]):
        raise InputError(f"`compression` and `{asked[0]}` exclude each other: leave one of them out")
    limit = _limit(_taken(given, LIMITS), given.pop("cost_table", None), free_rank_ratio="rank_ratio" not in settings)
    fused_qkv, weights = given.pop("fused_qkv", False), given.pop("weights", "float32")
    config = _config(name, method, given, recipe, seed)
    _check_allocation(config, recipe, limit, "allocation" in settings)
    return {
        "data": CalibrationData(images=own_images, general_images=general_images, nsamples=nsamples, seed=seed),
        "method": name,
        "method_digest": method.digest,
        "config": config,
        "recipe": recipe,
        "limit": limit,
        "fused_qkv": fused_qkv,
        "weights": weights,
    }


def read_options(method: str, text: str) -> dict[str, Any]:
    """Reads options of a method's config that are not settings of their own, such as "damping=0.1,penalty=alps".

    Raises:
        InputError: the method has no such option, or its value is invalid.
    """
    fields: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(find_method(method).config)}
    own = {name: default for name, default in fields.items() if name not in ("seed", *CONFIG_SETTINGS)}
    options = {}
    for item in text.split(",") if text else []:
        name, _, value = item.partition("=")
        if name not in own:
            raise _no_option(method, name, own)
        kind = type(own[name])
        try:
            options[name] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise InputError(
                f"`method_options`: {name}={value} is wrong: give {name} a value of type {kind.__name__}"
            ) from None
    return options


def _no_option(method: str, name: str, own: Iterable[str]) -> InputError:
    return InputError(f"the method {method} has no option {name!r}: it has {', '.join(own) or 'none'}", field=name)


def _taken(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: given.pop(name) for name in names if name in given}


def _refuse_layer_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Refuses settings that only layer-by-layer methods take.

    Raises:
        InputError: such a setting is given.
    """
    for setting in ("target", "refit_bias", "allocation"):
        if setting in settings:
            raise InputError(f"{name} compresses no single layers: leave `{setting}` out")
    for setting in (*LIMITS, "cost_table"):
        if settings.get(setting) is not None:
            raise InputError(
                f"`{setting}` is out of place, {name} removes heads and neurons: give `compression` instead", field=setting
            )
    if settings.get("fused_qkv"):
        raise InputError(f"{name} removes whole heads from q, k and v: leave `fused_qkv` out")


def _recipe(method: Method | StructuralMethod, given: dict[str, Any], general_images: str | None) -> Recipe:
    """The given recipe settings, completed from the method's own recipe."""
    if general_images and "calibration_mix" not in given:
        given["calibration_mix"] = "general"
    return dataclasses.replace(method.recipe, **given)


def _config(name: str, method: Method | StructuralMethod, given: dict[str, Any], recipe: Recipe, seed: int) -> Any:
    """The method's config from the given settings, the calibration mix and the method's defaults.

    Raises:
        InputError: the method has no such setting, or its value is invalid.
    """
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(method.config)}
    for setting in given.keys() - defaults.keys():
        if setting in CONFIG_SETTINGS:
            raise InputError(f"the method {name} takes no `{setting}`: leave it out")
    own = [option for option in defaults if option not in ("seed", *CONFIG_SETTINGS)]
    for option in given.keys() - {*CONFIG_SETTINGS, *own}:
        raise _no_option(name, option, own)
    if method.recipe.calibration_mix != "none" and recipe.calibration_mix == "none" and "damping" in defaults:
        given = {"damping": CLOSED_DOMAIN_DAMPING} | given
    if "seed" in defaults:
        given = given | {"seed": seed}
    if ":" in str(given.get("pattern", defaults.get("pattern"))):
        given = {"compression": None} | given  # N:M implies it
    return method.config(**given)


def _limit(asked: dict[str, float], cost_table: Path | None, free_rank_ratio: bool) -> CostLimit | None:
    if not asked:
        if cost_table is not None:
            raise InputError("`cost_table` is out of place, a compression needs no table: leave it out")
        return None
    if len(asked) > 1:
        raise InputError(f"{' and '.join(f'`{name}`' for name in asked)} exclude each other: leave one of them out")
    kind, value = next(iter(asked.items()))
    if kind == "max_mb" and cost_table is not None:
        raise InputError("`cost_table` is out of place, megabytes need no table: leave it out")
    return CostLimit(kind, value, cost_table, free_rank_ratio)  # type: ignore[arg-type]


def _check_allocation(config: Any, recipe: Recipe, limit: CostLimit | None, asked: bool) -> None:
    """Refuses a limit, or an allocation that was ``asked`` for, if nothing is left to decide.

    Raises:
        InputError: the pattern or the allocation fixes what is removed.
    """
    pattern, allocation = getattr(config, "pattern", ""), recipe.allocation
    if limit and ":" in pattern:
        raise InputError(
            f"`{limit.kind}` is out of place, {pattern} fixes what is removed: leave it out, or give `pattern='row'`"
        )
    if limit and allocation == "owl":
        raise InputError(
            f"`{limit.kind}` is out of place, owl splits a compression: give `allocation='sensitivity'`, or 'uniform'"
        )
    if asked and allocation != "uniform" and ":" in pattern:
        raise InputError(f"`allocation='{allocation}'` needs a budget for each layer, which {pattern} fixes: leave it out")
