"""Compares methods on a language model: perplexity on texts that did not calibrate. One JSON line a row, as they are found."""

import copy
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vitoats.common.errors import InputError, RunError, one_line
from vitoats.common.files import atomic_write, hold, remove_beside
from vitoats.common.fingerprint import json_sha256, tensors_sha256
from vitoats.common.json_files import LARGEST, parse_json, to_json
from vitoats.common.progress import Progress, silent
from vitoats.common.unfinished import Unfinished
from vitoats.common.whole_files import read_text
from vitoats.compression.job import CompressionJob
from vitoats.compression.run import prepare
from vitoats.compression.run import run as compress
from vitoats.compression.settings import make_job
from vitoats.evaluation.perplexity import Perplexity, TestText, perplexity, read_test_text, rounded_error, unfinished_perplexity
from vitoats.format.int4 import round_groups
from vitoats.format.layers import parameter_count
from vitoats.loading.language_models import load_language_model
from vitoats.loading.loaded_text import LoadedLanguageModel, untied_state
from vitoats.models.adapter import adapt

log = logging.getLogger("vitoats")

OWN = "own"  # as a pattern: each method's own default
INT8, INT4 = "int8", "4-bit"  # beside the methods: nothing is removed, and the layers of the blocks are rounded
FOR_ALL = (
    "nsamples",
    "seq_len",
    "batch_size",
    "device",
    "threads",
    "seed",
)  # arguments that have nothing to do with the method
METHOD_SETTINGS: dict[str, dict[str, Any]] = {"dass": {"attention": "wanda"}}  # attention, too: a whole model at one budget


@dataclass(frozen=True, kw_only=True)
class LanguageComparison:
    """The settings of a comparison.

    Attributes:
        model: a language model's name.
        texts: files or folders to calibrate on, in equal shares.
        tests: files or folders to measure on.
        methods: names of methods; also "int8", the int8 layers that compress makes of a dense model, and "4-bit"
            (``format.int4``, without calibration).
        patterns: "own", or patterns as the methods take them.
        compressions: shares of the weights to remove; N:M patterns imply their own.
        output: file of JSON lines, continued if it exists.
        shared: further arguments of ``make_job``.
        test_tokens: tokens of each test.
        stride: tokens by which the window moves; it is as long as in calibration.
    """

    model: str
    texts: tuple[str, ...]
    tests: tuple[str, ...]
    methods: tuple[str, ...]
    patterns: tuple[str, ...]
    compressions: tuple[float, ...]
    output: Path
    shared: Mapping[str, Any]
    test_tokens: int
    stride: int


@dataclass(frozen=True)
class Row:
    """One run of a method."""

    method: str
    pattern: str
    asked: float | None
    job: CompressionJob

    @property
    def key(self) -> str:
        """Identifies everything that the row depends on but the tests."""
        return json_sha256([self.method, self.job.to_dict()] if self.method == INT4 else self.job.to_dict())


def plan(comparison: LanguageComparison) -> list[Row]:
    """All rows; a pattern that a method does not take is left out, with a message.

    Raises:
        InputError: a method is unknown, or a setting is invalid.
    """
    rows = [_quantized(comparison, name) for name in (INT8, INT4) if name in comparison.methods]
    methods = [name for name in comparison.methods if name not in (INT8, INT4)]
    for pattern in comparison.patterns:
        for asked in [None] if ":" in pattern else comparison.compressions:
            for method in methods:
                settings = {"method": method, **METHOD_SETTINGS.get(method, {}), **comparison.shared}
                settings |= {} if pattern == OWN else {"pattern": pattern}
                settings |= {} if asked is None else {"compression": asked}
                try:
                    job = make_job(comparison.model, list(comparison.texts), text=True, **settings)
                except InputError as error:
                    if pattern == OWN:
                        raise
                    log.warning("left out: %s %s (%s)", method, pattern, error)
                    continue
                rows.append(Row(method, pattern, asked, job))
    return rows


def _quantized(comparison: LanguageComparison, name: str) -> Row:
    """The row of the rounded dense model."""
    settings = {key: comparison.shared[key] for key in FOR_ALL if key in comparison.shared}
    settings |= {"method": "magnitude", "compression": 0.0, "weights": "int8" if name == INT8 else "float32"}
    return Row(name, OWN, None, make_job(comparison.model, list(comparison.texts), text=True, **settings))


def compare(comparison: LanguageComparison, progress: Progress = silent) -> dict[str, Any]:
    """Measures the rows that ``output`` does not have yet, and appends each to it.

    Returns:
        the dense model's perplexities, and the rows as they are in the file: the dense one, then those that were asked for.

    Raises:
        InputError: the model, a text or a setting is invalid, or ``output`` holds something else.
        RunError: some rows failed; the same comparison again retries them.
    """
    rows = plan(comparison)
    if not rows:
        raise InputError("there is nothing to compare: give `methods` some, with `compressions`")
    with hold(comparison.output):
        return _make_rows(comparison, rows, progress)


def _make_rows(comparison: LanguageComparison, rows: list[Row], progress: Progress) -> dict[str, Any]:
    """Measures the missing rows; returns the result."""
    found = _read(comparison.output)
    first = rows[0].job
    prepare(first.resources)
    loaded = load_language_model(comparison.model, first.data.seq_len)  # type: ignore[union-attr]
    inputs, tokenizer = loaded.inputs, loaded.need_tokenizer()
    tests = {
        Path(name).stem: read_test_text(name, tokenizer, inputs.vocab_size, comparison.test_tokens) for name in comparison.tests
    }

    of_dense: list[Unfinished] = []  # until all rows are there

    def measure(model: Any, what: str, folder: Path | None = None) -> dict[str, Perplexity]:
        model.to(first.resources.device)
        digest, found = tensors_sha256(untied_state(model)), {}
        windows = (inputs.seq_len, comparison.stride, first.resources.batch_size)
        for name, text in tests.items():
            unfinished = unfinished_perplexity(digest, text, *windows, folder)
            of_dense.extend([] if folder else [unfinished])
            found[name] = perplexity(model, text, *windows, partial(_update, progress, f"{what} on {name}"), unfinished)
        return found

    measured_on = json_sha256([_described(tests), inputs.seq_len, comparison.stride])
    dense = measure(loaded.model, "dense")
    # by key; the dense model's row has none
    done = {row.get("key"): row for row in found if row.get("measured_on") == measured_on}
    if None not in done:
        done[None] = {"method": "dense", "measured_on": measured_on, **_figures(dense, dense)}
        _append(comparison.output, done[None])
    failed = []
    for i, row in enumerate(rows, 1):
        name = f"{row.method} {row.pattern} {'' if row.asked is None else f'{row.asked:g}'}".strip()
        kept = comparison.output.with_name(f"{comparison.output.name}.{row.key[:16]}.partial")
        if row.key in done:
            remove_beside(comparison.output, kept)  # if it was killed before it did
            log.info("[%d/%d] %s is done already", i, len(rows), name)
            continue
        log.info("[%d/%d] %s", i, len(rows), name)
        try:
            model, made = _made(row, replace(loaded, model=copy.deepcopy(loaded.model)), kept, progress)
            figures = {
                "method": row.method,
                "pattern": row.pattern,
                "asked": row.asked,
                **made,
                **_figures(measure(model, name, kept), dense),
                "key": row.key,
                "measured_on": measured_on,
            }
        except (InputError, RunError) as error:
            log.error("%s failed: %s", name, error)
            failed.append(name)
            continue
        _append(comparison.output, figures)
        done[row.key] = figures
        remove_beside(comparison.output, kept)
    if failed:
        raise RunError(
            f"failed: {', '.join(failed)}; the other rows are in {comparison.output}, and the same command tries again"
        )
    for each in of_dense:
        each.remove()
    return {
        "model": comparison.model,
        "dense": _figures(dense, dense)["perplexity"],
        "rows": [done[key] for key in (None, *(row.key for row in rows))],
        "output": str(comparison.output),
    }


def _update(progress: Progress, stage: str, done: int, total: int) -> None:
    progress(stage, done, total, "")


def _made(row: Row, loaded: LoadedLanguageModel, kept: Path, progress: Progress) -> tuple[Any, dict[str, Any]]:
    """The model of a row, and figures of it; ``loaded`` is changed in place, and finished blocks are in the folder ``kept``."""
    if row.method == INT4:
        for layer in adapt(loaded.model, loaded.inputs).linears:
            layer.module.weight.data = round_groups(layer.module.weight.data)
        return loaded.model, {"compression": 0.0, "parameters": parameter_count(loaded.model)}
    compressed = compress(row.job, loaded=loaded, partial_folder=kept, resume=True, progress=progress)
    return compressed.model, {
        "compression": round(compressed.report.compression, 5),
        "parameters": parameter_count(compressed.model),
        "feature_error": {name: round(x, 5) for name, x in compressed.about["feature_error"].items()},
        "seconds": round(compressed.report.seconds, 1),
        "config": dataclasses.asdict(row.job.config),
        "recipe": dataclasses.asdict(row.job.recipe),
    }


def _figures(found: dict[str, Perplexity], dense: dict[str, Perplexity]) -> dict[str, Any]:
    """The figures by test; differences are those of log perplexities to the dense model, window by window."""
    differences = {name: one.against(dense[name]) for name, one in found.items()}
    return {
        "perplexity": {name: round(one.per_token, 4) for name, one in found.items()},
        "perplexity_se": {name: rounded_error(one.standard_error, 4) for name, one in found.items()},
        "log_difference": {name: round(difference, 5) for name, (difference, _) in differences.items()},
        "log_difference_se": {name: rounded_error(error, 5) for name, (_, error) in differences.items()},
    }


def _described(tests: dict[str, TestText]) -> dict[str, Any]:
    return {name: [json_sha256(text.tokens.tolist()), text.words] for name, text in tests.items()}


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a last line that is cut short is left out.

    Raises:
        InputError: the file holds something else.
    """
    return list(_lines(path)) if path.is_file() else []


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = read_text(path, LARGEST).splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error, 100)}): give another `output`") from None
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError
            yield row
        except ValueError:
            if number < len(lines):
                raise InputError(f"line {number} of {path} is no row of a comparison: give another `output`") from None


def _append(path: Path, row: dict[str, Any]) -> None:
    """Appends a row; a last line that is cut short goes. The file is written whole or not at all."""
    lines = [*map(json.dumps, _read(path)), to_json(row)]
    with atomic_write(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
