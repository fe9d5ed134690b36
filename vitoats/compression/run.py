"""Carries out a ``CompressionJob``: load the model, draw the images, find the budgets, compress, and measure the result."""

import dataclasses
import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from vitoats.common import ranks
from vitoats.common.devices import check_device, set_threads
from vitoats.common.errors import InputError
from vitoats.common.fingerprint import fingerprint
from vitoats.common.machine import cores
from vitoats.common.memory import never_keep_freed_memory, reuse_freed_memory
from vitoats.common.noted import note
from vitoats.common.outputs import check_output_folder
from vitoats.common.progress import Progress, silent
from vitoats.compression.budgets import make_budgets
from vitoats.compression.constraints import make_constraint, predict
from vitoats.compression.job import CalibrationData, CalibrationText, CompressionJob, Resources
from vitoats.compression.outlook import Outlook, outlook
from vitoats.compression.pipeline import CompressionReport, compress
from vitoats.compression.plan import CompressionPlan, plan_compression
from vitoats.compression.resume import BlockStore
from vitoats.compression.structural import PruningReport, prune, pruning_outlook
from vitoats.data.calibration import CalibrationImages, calibration_images
from vitoats.data.text import calibration_text
from vitoats.evaluation.fidelity import Fidelity
from vitoats.format.counts import count
from vitoats.loading.checkpoint import save_checkpoint
from vitoats.loading.language_checkpoint import save_language_checkpoint
from vitoats.loading.language_models import load_language_model
from vitoats.loading.loaded import LoadedModel
from vitoats.loading.loaded_text import LoadedLanguageModel
from vitoats.loading.source import open_model
from vitoats.methods.registry import Method, StructuralMethod, find_method
from vitoats.models.adapter import adapt
from vitoats.models.blocks import ModelAdapter
from vitoats.models.flops import count_flops

log = logging.getLogger("vitoats")

Format = Literal["factored", "dense"]

HELD_OUT, HELD_OUT_WINDOWS = 32, 4  # images, or windows, of each kind held out of calibration, to measure features on
DOMAIN_RATIO = 3  # warn if the feature error on other images is more than this many times as large


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A compressed model.

    Attributes:
        loaded: the model with its preprocessing.
        about: the contents of vitoats.json.
        report: the figures of all layers, or of all attentions and MLPs.
    """

    loaded: LoadedModel | LoadedLanguageModel
    about: dict[str, Any]
    report: CompressionReport | PruningReport

    @property
    def vision_model(self) -> LoadedModel:
        """The compressed vision model.

        Raises:
            InputError: it is a language model.
        """
        if isinstance(self.loaded, LoadedLanguageModel):
            raise InputError(f"{self.loaded.name} is a language model, which takes no images: use eval_perplexity")
        return self.loaded

    @property
    def model(self) -> torch.nn.Module:
        """The torch module: images [batch, 3, h, w] to logits, or to features if there is no head; or a transformers model.

        A language model whose blocks are on disk is read into memory.
        """
        if isinstance(self.loaded, LoadedLanguageModel):
            self.loaded.read_whole()
        return self.loaded.model

    def save(self, output: str | Path, format: Format = "factored", overwrite: bool = False) -> Path:
        """Writes the folder that ``vitoats.load`` opens; of several processes, the first one does.

        Args:
            output: the folder, written completely or not at all.
            format: "factored" stores S, U and V; "dense" folds them, so that timm opens the folder as local-dir:, or
                transformers as its own.
            overwrite: replace a folder that compress wrote.

        Raises:
            InputError: the folder exists, or the format does not suit the model.
            RunError: the folder is not writable.
        """
        if not ranks.is_first():
            return Path(output)
        check_output_folder(Path(output), overwrite)
        about = self.about
        if format == "dense":
            about = {**about, "flops": about["flops_before"]}  # zeros are multiplied, too
        settings: dict[str, Any] = {"dense": format == "dense", "overwrite": overwrite}
        if isinstance(self.loaded, LoadedLanguageModel):
            save_language_checkpoint(self.loaded, Path(output), about, **settings)
        else:
            save_checkpoint(self.loaded, Path(output), about, **settings)
        return Path(output)


def run(
    job: CompressionJob,
    *,
    loaded: LoadedModel | LoadedLanguageModel | None = None,
    images: Any = None,
    scratch: Path | None = None,
    partial_folder: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Compressed:
    """Compresses a model.

    Args:
        job: the compression job.
        loaded: the dense model, if it is already in memory; it is compressed in place.
        images: the images, if they are already in memory: a dataset of (tensor [3, h, w], label); or a list of texts.
        scratch: a folder for hidden states, used under a memory limit.
        partial_folder: where finished blocks are kept for ``resume``; None keeps none.
        resume: continue from the blocks in ``partial_folder``.
        progress: called with what is being done.

    Raises:
        InputError: the model, the images or the settings are invalid.
        RunError: disk space or memory runs out.
    """
    method, loaded, adapter, drawn = _begin(job, loaded, images)
    model, inputs = loaded.backbone, loaded.inputs
    plan, expected = _planned(job, method, loaded, adapter, drawn, scratch)
    for line in expected.lines():
        log.info(line)
    constraint = None
    if job.limit and isinstance(method, Method) and isinstance(loaded, LoadedModel):
        constraint = make_constraint(job, job.limit, method, loaded, adapter, progress)
    buffers = {name for name, _ in model.named_buffers()}
    before, flops_before = count(loaded.dense_tensors(), not_parameters=buffers), count_flops(model, inputs)
    settings = described(job, loaded, drawn, None if constraint is None else constraint.to_dict())
    store = None
    if partial_folder is not None:
        depends_on = {"job": job.to_dict(), "preprocessing": settings["preprocessing"], "goal": settings["goal"]}
        digest = fingerprint(loaded.dense_tensors(), depends_on | {"images": drawn.digests()})
        store = BlockStore(partial_folder, digest, resume, plan.types if plan else None)
    elif plan is not None and plan.disk:
        folder = ranks.from_first(lambda: tempfile.mkdtemp(prefix="vitoats-", dir=scratch))
        store = BlockStore(Path(folder), "", types=plan.types, temporary=True)
    try:
        config, budgets = make_budgets(job, adapter, drawn, constraint, loaded, progress)
        if isinstance(loaded, LoadedModel) and drawn.are_copies():
            log.warning("your own calibration images are copies of one: only the others say what inputs look like")
        predicted = {} if constraint is None else predict(constraint, config, budgets)
        if plan is not None and (budgets is not None or config is not job.config):
            plan = plan.with_budgets(config, budgets)
        fidelity = Fidelity(model, inputs, drawn.held_out, job.resources.batch_size, job.resources.workers)
        stage = partial(progress, "block")
        stream = drawn.batches(job.resources.batch_size, job.resources.workers)
        report: CompressionReport | PruningReport
        if plan is None:
            report = prune(adapter, job, stream, drawn.nsamples, scratch, stage, store)
        else:
            report = compress(plan, stream, store, stage)
    except BaseException:
        if store:
            store.settle()
        raise
    about = {
        "weights": loaded.weights,
        **settings,
        "config": dataclasses.asdict(config),
        "budgets": budgets,
        "predicted": predicted,
        **_without_seconds(report.to_dict()),
        "counts_before": dataclasses.asdict(before),
        "flops_before": flops_before,
        "flops": count_flops(model, inputs),
        "feature_error": fidelity.errors(model),
    }
    _warn_of_other_domains(about["feature_error"], job.recipe.calibration_mix)
    return Compressed(loaded, about, report)


def preview(job: CompressionJob, *, scratch: Path | None = None) -> Outlook:
    """What compressing covers and takes; nothing is compressed.

    Args:
        job: the compression job.
        scratch: as in ``run``.

    Raises:
        InputError: the model, the images or the settings are invalid.
    """
    method, loaded, adapter, drawn = _begin(job)
    return _planned(job, method, loaded, adapter, drawn, scratch)[1]


def _begin(
    job: CompressionJob, loaded: LoadedModel | LoadedLanguageModel | None = None, images: Any = None
) -> tuple[Method | StructuralMethod, LoadedModel | LoadedLanguageModel, ModelAdapter, CalibrationImages]:
    """Opens the model and the images; a model that does not fit is refused here."""
    method = find_method(job.method)
    prepare(job.resources)
    loaded = loaded or _open(job, method)
    if isinstance(loaded, LoadedLanguageModel) and loaded.disk:  # which is on the device already
        never_keep_freed_memory()
    else:
        loaded.backbone.to(job.resources.device)
        if job.resources.memory_limit is None:
            reuse_freed_memory()
        else:
            never_keep_freed_memory()
    adapter = adapt(loaded.backbone, loaded.inputs)
    drawn = draw_images(job, loaded, images)
    note(lambda: {f"calibration data ({name})": digest for name, digest in drawn.digests().items()})
    return method, loaded, adapter, drawn


def _planned(
    job: CompressionJob,
    method: Method | StructuralMethod,
    loaded: LoadedModel | LoadedLanguageModel,
    adapter: ModelAdapter,
    drawn: CalibrationImages,
    scratch: Path | None,
) -> tuple[CompressionPlan | None, Outlook]:
    """The plan, which a structural method does not have, and the outlook."""
    if isinstance(method, StructuralMethod):
        return None, pruning_outlook(adapter, job, drawn.nsamples)
    stored = (loaded.types, loaded.disk) if isinstance(loaded, LoadedLanguageModel) else (None, None)
    plan = plan_compression(adapter, job, drawn.nsamples, scratch, *stored)
    if job.limit is None and job.recipe.allocation == "uniform":
        plan = plan.with_budgets(job.config, None)  # a budget that leaves nothing of a layer fails here
    return plan, outlook(plan, job)


def prepare(resources: Resources) -> None:
    """Sets up the process: threads and device.

    Raises:
        InputError: the device is not available in torch.
    """
    set_threads(resources.threads or (max(1, cores() // ranks.on_this_machine()) if ranks.size() > 1 else 0))
    check_device(resources.device)


def _open(job: CompressionJob, method: Method | StructuralMethod) -> LoadedModel | LoadedLanguageModel:
    if isinstance(job.data, CalibrationText):
        in_blocks = isinstance(method, Method)  # a structural method changes the shapes of what would be read again
        loaded = load_language_model(job.model.name, job.data.seq_len, job.resources.device if in_blocks else None)
        log.info("model: %s (%s); %s", job.model.name, loaded.weights, loaded.preprocessing)
        return loaded
    return open_model(job.model)


def draw_images(job: CompressionJob, loaded: LoadedModel | LoadedLanguageModel, images: Any = None) -> CalibrationImages:
    """Opens the images or texts and draws those for calibration; ``images``, if given, are already in memory."""
    data = job.data
    if isinstance(loaded, LoadedLanguageModel):
        assert isinstance(data, CalibrationText)
        inputs, texts = loaded.inputs, list(data.texts) if images is None else [images]
        tokenizer = loaded.need_tokenizer()
        return calibration_text(texts, tokenizer, inputs.seq_len, inputs.vocab_size, data.nsamples, HELD_OUT_WINDOWS, data.seed)
    assert isinstance(data, CalibrationData)
    preprocessing = loaded.preprocessing
    return calibration_images(
        data.images if images is None else images,
        data.general_images,
        job.recipe.calibration_mix,
        data.nsamples,
        HELD_OUT,
        data.seed,
        preprocessing,
    )


def described(
    job: CompressionJob, loaded: LoadedModel | LoadedLanguageModel, drawn: CalibrationImages, goal: dict[str, Any] | None
) -> dict[str, Any]:
    """The entries of vitoats.json that describe a job."""
    data = job.data
    counted = {name: len(source) for name, source in drawn.sources.items()}
    if isinstance(data, CalibrationText):
        calibration = {"texts": data.texts, "nsamples": data.nsamples, "seed": data.seed, "windows": counted}
    else:
        calibration = {
            "data": data.images,
            "general_images": data.general_images,
            "nsamples": data.nsamples,
            "seed": data.seed,
            "images": counted,
        }
    return {
        "model": job.model.name,
        "method": job.method,
        "method_digest": job.method_digest,
        "config": dataclasses.asdict(job.config),
        "goal": goal,
        "recipe": dataclasses.asdict(job.recipe),
        "fused_qkv": job.fused_qkv,
        **({"weight_type": job.weights} if job.int8 else {}),
        "preprocessing": loaded.preprocessing.to_dict(),
        "calibration": calibration,
    }


def _without_seconds(figures: dict[str, Any]) -> dict[str, Any]:
    """A report without its timings, so that the same job writes the same bytes."""
    return {
        key: [_without_seconds(row) if isinstance(row, dict) else row for row in value] if isinstance(value, list) else value
        for key, value in figures.items()
        if key != "seconds"
    }


OTHER_DOMAINS = {  # by the calibration mix that was used: what helps images unlike the user's
    "none": "use `calibration_mix='synthetic'`, or give `general_images` a folder",
    "synthetic": "add varied images with `general_images` and `calibration_mix='both'`, or raise `nsamples`",
    "general": "use `calibration_mix='both'`, or raise `nsamples`",
    "both": "raise `nsamples`, or lower `compression`",
}


def _warn_of_other_domains(errors: dict[str, float], mix: str) -> None:
    """Logs the feature errors on held-out images, and warns if images unlike the user's have much larger ones."""
    log.info(
        "relative feature error on held-out images (0 as before, 1 no better than the mean feature): %s",
        ", ".join(f"{k} {v:.3f}" for k, v in errors.items()),
    )
    if errors.get("synthetic", 0) > DOMAIN_RATIO * errors.get("own", float("inf")):
        ratio = f"{errors['synthetic'] / errors['own']:.1f} times" if errors["own"] else "many times"
        log.warning(
            "features of images unlike yours are off %s as much as those of yours: if the model is to see such images, %s",
            ratio,
            OTHER_DOMAINS[mix],
        )
