"""Gathers a report: reads folders and results, opens the models that it needs, and writes the page."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.common.files import atomic_write
from vitoats.common.progress import Progress, silent
from vitoats.data.images import SAMPLE, open_images
from vitoats.data.text import documents, token_stream
from vitoats.format.layers import compressed_layers
from vitoats.loading.checkpoint import load_checkpoint
from vitoats.loading.language_models import load_language_model
from vitoats.loading.loaded import LoadedModel
from vitoats.loading.loaded_text import LoadedLanguageModel
from vitoats.loading.names import EMBEDDED
from vitoats.loading.smollm2 import NAME as EMBEDDED_LANGUAGE_MODEL
from vitoats.loading.source import ModelSource, open_model
from vitoats.report.page.attention import attention_section
from vitoats.report.page.convergence import convergence_section
from vitoats.report.page.document import Missing, Section
from vitoats.report.page.fronts import fronts
from vitoats.report.page.headline import headline
from vitoats.report.page.language import language_section
from vitoats.report.page.layers import layers_section
from vitoats.report.page.page import render
from vitoats.report.page.sources import Results, Run, Sources, read_sources, text
from vitoats.report.page.weights import chosen_layers, weights_section

IMAGES = 32  # whose inputs the solver gets again
TOKENS = 1024
STAGES = 6


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page is to show.

    Attributes:
        paths: folders that compress, compare or front wrote; files of results.
        output: the HTML file.
        results: measurements that are in no file.
        dense: the model before compression; None takes it from the first folder's vitoats.json only if it is embedded, so
            that a folder from elsewhere cannot name files to open.
        data: images, or text for a language model; None takes the embedded sample.
        layers: names of layers to look into; one block's by default.
        n_images: images with attention maps.
    """

    paths: Sequence[Path]
    output: Path
    results: Sequence[Results] = ()
    dense: ModelSource | None = None
    data: str | None = None
    layers: Sequence[str] = ()
    n_images: int = 4


def write_report(report: Report, progress: Progress = silent) -> dict[str, Any]:
    """Writes the page. Weights, convergence, attention and text are those of the first folder with a compressed model.

    Returns:
        the number of runs and of measurements, the sections, and the file with its bytes.

    Raises:
        InputError: a path is no run, is damaged, or does not fit the others.
        RunError: the page cannot be written.
    """
    sources = read_sources(report.paths)
    sources = replace(sources, results=[*sources.results, *report.results])
    progress("report", 0, STAGES, "figures")
    sections = [headline(sources), fronts(sources), layers_section(sources.runs)]
    if sources.runs:
        sections += _inside(sources.runs[0], report, progress)
    shown = [section for section in sections if section is not None]
    page = render(_title(sources), _subtitle(sources), shown)
    with atomic_write(report.output, "give another `output`") as partial:
        partial.write_text(page, encoding="utf-8")
    progress("report", STAGES, STAGES, "done")
    return {
        "runs": len(sources.runs),
        "measurements": sum(len(results.rows) for results in sources.results),
        "sections": [section.id for section in shown],
        "bytes": len(page.encode()),
        "output": str(report.output),
    }


def _inside(run: Run, report: Report, progress: Progress) -> list[Section]:
    """The sections for which models are opened."""
    progress("report", 1, STAGES, "opening the models")
    loaded = load_language_model(str(run.folder)) if run.is_language_model else load_checkpoint(run.folder)
    dense = _open_dense(run, report.dense, loaded)
    progress("report", 2, STAGES, "singular values")
    sections = [_weights(run, report.layers, loaded, dense)]
    progress("report", 3, STAGES, "convergence")
    source = report.data or "the embedded sample"
    if isinstance(loaded, LoadedLanguageModel):
        tokens = _tokens(report.data or SAMPLE, loaded)
        sections.append(_convergence(run, dense, lambda model: model(input_ids=tokens[None, :TOKENS])))
        progress("report", 4, STAGES, "text")
        assert dense is None or isinstance(dense, LoadedLanguageModel)
        sections.append(language_section(loaded, dense, tokens, source))
    else:
        images = _images(report.data or SAMPLE, loaded)
        sections.append(_convergence(run, dense, lambda model: model(images)))
        progress("report", 4, STAGES, "attention")
        assert dense is None or isinstance(dense, LoadedModel)
        shown = images[:: max(1, len(images) // report.n_images)][: report.n_images]
        sections.append(attention_section(run.name, loaded, dense, shown, source))
    return sections


def _open_dense(
    run: Run, source: ModelSource | None, loaded: LoadedModel | LoadedLanguageModel
) -> LoadedModel | LoadedLanguageModel | None:
    """The dense model of a run; None if it is not known."""
    embedded = EMBEDDED_LANGUAGE_MODEL if run.is_language_model else EMBEDDED
    if source is None and run.model != embedded:
        return None
    source = source or ModelSource(name=embedded)
    if isinstance(loaded, LoadedLanguageModel):
        dense: LoadedModel | LoadedLanguageModel = load_language_model(source.name)
    else:
        dense = open_model(replace(source, img_size=loaded.preprocessing.img_size), with_head=False)
    inner, model = dict(dense.backbone.named_modules()), loaded.backbone
    if type(dense.backbone) is not type(model) or any(name not in inner for name in compressed_layers(model)):
        raise InputError(f"{source.name} is not the model that {run.folder} was made of: give `dense` that one")
    return dense


def _weights(
    run: Run, named: Sequence[str], loaded: LoadedModel | LoadedLanguageModel, dense: LoadedModel | LoadedLanguageModel | None
) -> Section:
    layers = compressed_layers(loaded.backbone)
    if not layers:
        why = (
            "the folder holds S + U V folded" if run.about.get("format") == "dense" else f"{text(run.about, 'method')} has none"
        )
        part = Missing(f"S, U and V of the layers: {why}", "python tools/compress.py ..., without --format dense")
        return Section("weights", "Weights", "Singular values and supports of chosen layers.", [part])
    names = chosen_layers([layer for layer in run.layers if layer.name in layers], named)
    known = dict(dense.backbone.state_dict()) if dense else {}
    found = {name: known[f"{name}.weight"] for name in names if f"{name}.weight" in known}
    return weights_section(names, layers, found)


def _convergence(run: Run, dense: LoadedModel | LoadedLanguageModel | None, call: Any) -> Section:
    if dense is None or "layers" not in run.about or not run.layers:
        why = "needs the weights of the dense model" if dense is None else "no layer was decomposed"
        part = Missing(f"the curve {why}", "add --dense MODEL" if dense is None else "")
        return Section("convergence", "Convergence", "The solver's error by its iterations.", [part])
    return convergence_section(run, dense.backbone, lambda: call(dense.backbone))


def _images(source: str, loaded: LoadedModel) -> Tensor:
    """Up to ``IMAGES`` images [n, channels, h, w], evenly spaced over a set."""
    dataset = open_images(source, "test", loaded.preprocessing.transform())
    step = max(1, len(dataset) // IMAGES)
    items = (dataset[i] for i in range(0, len(dataset), step))
    found = [item[0] for item in items if isinstance(item, tuple)][:IMAGES]
    if not found:
        raise InputError(f"no image in {source} can be read: give `data_dir` another folder")
    return torch.stack(found)


def _tokens(source: str, loaded: LoadedLanguageModel) -> Tensor:
    """The first tokens [n] of a text, at most as many as the model takes."""
    tokenizer = loaded.need_tokenizer()
    most = min(TOKENS, loaded.inputs.seq_len)
    found = torch.empty(0, dtype=torch.long)
    for document in documents(source):
        found = torch.cat([found, token_stream([document[: 20 * TOKENS]], tokenizer)])[:most]
        if len(found) == most:
            break
    if len(found) < 2 or int(found.max()) >= loaded.inputs.vocab_size:
        raise InputError(f"{source} is no text for {loaded.name}: give `data_dir` another one")
    return found


def _title(sources: Sources) -> str:
    names = [run.name for run in sources.runs] or [results.file.stem for results in sources.results]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _subtitle(sources: Sources) -> str:
    """What the first run is."""
    if not sources.runs:
        return sources.results[0].conditions if sources.results else ""
    about = sources.runs[0].about
    settings = about.get("config") or {}
    words = [sources.runs[0].model, text(about, "method"), text(about, "weight_type")]
    words += [f"{name.replace('_', ' ')} {settings[name]}" for name in ("rank_ratio", "pattern") if name in settings]
    return ", ".join(str(word)[:60] for word in words if word)
