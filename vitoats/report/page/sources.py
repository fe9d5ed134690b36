"""Reads what a report is about: folders that compress wrote, and measurements in JSON, JSON lines and CSV.

Everything here is a stranger's: texts stay texts, numbers are checked, and no path in a file is opened.
"""

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitoats.common.errors import InputError, one_line
from vitoats.common.json_files import LARGEST, parse_json
from vitoats.common.manifest import is_record
from vitoats.common.whole_files import read_text
from vitoats.loading.checkpoint import ABOUT, is_checkpoint, read_about
from vitoats.runtime.inference import stored_bytes

ENDINGS = (".json", ".jsonl", ".csv", ".onnx")
MEASURED = ("top1", "perplexity", "ms", "latency_ms")  # a result has at least one of these
DENSE, INT8 = ("dense",), ("int8", "native-int8")  # names of methods that remove nothing
MOST_ROWS, LONGEST = 2000, 200  # rows of a file, characters of a text


@dataclass(frozen=True)
class Layer:
    """The figures of a layer, or of the attention or MLP of a structural method.

    Attributes:
        name: dotted name.
        removed: share of the weights that was removed.
        error: relative error of its output; None if it is not recorded.
        rank: sum of the ranks of its parts.
        steps: iterations of the solver.
    """

    name: str
    removed: float
    error: float | None
    rank: int
    steps: int

    @property
    def block(self) -> str:
        """The name of its block: everything up to the last number."""
        return self._split[0]

    @property
    def kind(self) -> str:
        """Its name within the block."""
        return self._split[1]

    @property
    def _split(self) -> tuple[str, str]:
        found = re.fullmatch(r"(.*\.\d+)\.([^\d].*?)", self.name)
        return (found[1], found[2]) if found else ("", self.name)


@dataclass(frozen=True)
class Run:
    """A folder that compress wrote, with the content of its vitoats.json."""

    folder: Path
    about: dict[str, Any]
    layers: list[Layer]

    @property
    def name(self) -> str:
        return self.folder.name or str(self.folder)

    @property
    def model(self) -> str:
        """The name of the model that was compressed."""
        return text(self.about, "model") or "a model"

    @property
    def is_language_model(self) -> bool:
        return self.about.get("kind") == "causal language model"

    @property
    def is_factored(self) -> bool:
        """Whether S, U and V are in the folder."""
        return self.about.get("format") == "factored" and bool(self.about["row_blocks"])


@dataclass(frozen=True)
class Row:
    """One measurement; what was not measured is None.

    Attributes:
        name: of the method, the variant, the model or the file.
        role: "dense", "int8" (dense, with int8 weights) or "compressed".
        weights: the type of the weights.
        removed: share of the weights.
    """

    name: str
    role: str
    weights: str | None = None
    removed: float | None = None
    top1: float | None = None
    top1_se: float | None = None
    perplexity: float | None = None
    ms: float | None = None
    bytes: float | None = None
    file: str | None = None


@dataclass(frozen=True)
class Results:
    """The measurements of one file, which were made under the same ``conditions``."""

    file: Path
    conditions: str
    rows: list[Row]


@dataclass(frozen=True)
class Sources:
    """Everything that a report is about."""

    runs: list[Run]
    results: list[Results]


def read_sources(paths: Sequence[Path]) -> Sources:
    """Reads folders, and files of results or ONNX files; of a folder all that it holds at its top level.

    Raises:
        InputError: a path does not exist, holds nothing to report about, or is damaged.
    """
    runs, results = [], []
    for path in paths:
        if path.is_dir():
            found = [_run(path)] if is_checkpoint(path) else []
            inside = [*_results_in(path)]
            if not found and not inside:
                raise InputError(
                    f"{path} is no run (it has neither {ABOUT} nor results): "
                    "name a folder that compress, compare or front wrote"
                )
            runs += found
            results += inside
        elif path.suffix not in ENDINGS or not path.is_file():
            raise InputError(f"there is no run and no file of results {path}: name a folder, or a .json, .jsonl or .csv file")
        elif path.suffix == ".onnx":
            results.append(Results(path, "not measured", [_row_of_file(path)]))
        elif (read := _results(path)) is None:
            raise InputError(f"{path} holds no results: name what a command wrote with --results-file")
        else:
            results.append(read)
    return Sources(runs, results)


def results_of(file: Path, said: Any) -> Results | None:
    """The measurements in what a command printed; None if there are none."""
    found: list[Row] = []
    conditions: dict[str, Any] = {}
    for whole in said if isinstance(said, list) else [said]:
        if not isinstance(whole, dict):
            continue
        nested = whole.get("rows")
        for row in nested if isinstance(nested, list) else [whole]:
            if isinstance(row, dict) and any(key in row for key in MEASURED):
                conditions = conditions or {**whole, **row}
                found.append(_row(row))
    return Results(file, _conditions(conditions), found[:MOST_ROWS]) if found else None


def text(values: Any, *names: str) -> str | None:
    """The first of these entries that is a text, cut to a bearable length."""
    for name in names if isinstance(values, Mapping) else ():
        value = values.get(name)
        if isinstance(value, str) and value:
            return value if len(value) <= LONGEST else value[:LONGEST] + "..."
    return None


def figure(values: Any, *names: str) -> float | None:
    """The first of these entries that is a finite number."""
    for name in names if isinstance(values, Mapping) else ():
        value = values.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def _run(folder: Path) -> Run:
    try:
        about = read_about(folder)
        rows = about["layers"] if "layers" in about else about["modules"]
        for key in ("config", "recipe", "budgets", "feature_error"):
            if not isinstance(about.get(key) or {}, dict):
                raise ValueError(f"{key} is no object")
        return Run(folder, about, [_layer(row) for row in rows])
    except InputError:
        raise
    except Exception as error:  # whatever a damaged value leads to
        reason = f"{type(error).__name__}: {one_line(error, 100)}"
        raise InputError(f"{folder / ABOUT} is damaged ({reason}): copy or make the folder again") from None


def _layer(row: dict[str, Any]) -> Layer:
    name = text(row, "name")
    if name is None:
        raise ValueError("a layer has no name")
    if "before" in row:
        removed, rank = 1 - row["kept"] / row["before"], 0
    else:
        removed, rank = 1 - row["kept_parameters"] / (row["d_out"] * row["d_in"]), sum(row["ranks"])
    if not math.isfinite(removed):
        raise ValueError(f"the figures of {name} are none")
    return Layer(name, removed, figure(row, "relative_error"), int(rank), int(figure(row, "steps") or 0))


def _results_in(folder: Path) -> Iterator[Results]:
    """The results in a folder; a row of a table beside its own JSON is not read twice."""
    of_kind = (file for file in folder.iterdir() if file.suffix in ENDINGS and file.is_file())
    files = sorted(file for file in of_kind if file.name != ABOUT and not is_record(file.name))
    texts = [file for file in files if file.suffix in (".json", ".jsonl")]
    found = [read for file in texts if (read := _results(file, strict=False))]
    if not found:
        found = [read for file in files if file.suffix == ".csv" and (read := _results(file, strict=False))]
    yield from found
    known = {row.file for read in found for row in read.rows}
    rest = [_row_of_file(file) for file in files if file.suffix == ".onnx" and file.name not in known]
    if rest:
        yield Results(folder, "ONNX files, not measured", rest[:MOST_ROWS])


def _results(file: Path, strict: bool = True) -> Results | None:
    try:
        words = read_text(file, LARGEST)
        if file.suffix == ".csv":
            said: Any = [{k: _value(v) for k, v in row.items() if k} for row in csv.DictReader(words.splitlines())]
        elif file.suffix == ".jsonl":
            said = [parse_json(line) for line in words.splitlines() if line.strip()]
        else:
            said = parse_json(words)
        return results_of(file, said)
    except (OSError, ValueError, csv.Error) as error:
        if not strict:
            return None
        raise InputError(f"{file} is damaged ({one_line(error, 100)}): write it again with --results-file") from None


def _value(cell: Any) -> Any:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return cell


def _row(said: Mapping[str, Any]) -> Row:
    file = text(said, "file", "model")
    file = Path(file).name if file else None
    name = text(said, "method", "variant") or file or "a model"
    perplexity = said.get("perplexity")
    if isinstance(perplexity, dict):  # of several texts
        perplexity = next(iter(perplexity.values()), None)
    megabytes = figure(said, "file_mb", "onnx_mb")
    return Row(
        name=name,
        role=_role(name, figure(said, "compression")),
        weights=text(said, "weights") if text(said, "weights") in ("float32", "int8", "float16") else None,
        removed=figure(said, "compression"),
        top1=figure(said, "top1"),
        top1_se=figure(said, "top1_se"),
        perplexity=figure({"perplexity": perplexity}, "perplexity"),
        ms=figure(said, "ms", "latency_ms"),
        bytes=figure(said, "bytes") if megabytes is None else 1e6 * megabytes,
        file=file,
    )


def _row_of_file(file: Path) -> Row:
    return Row(name=file.name, role=_role(file.stem, None), bytes=float(stored_bytes(file)), file=file.name)


def _role(name: str, removed: float | None) -> str:
    lowered = name.lower()
    if lowered in INT8 or lowered.startswith(("dense int8", "openvino-int8")):
        return "int8"
    if lowered in DENSE or (removed == 0 and not lowered.endswith(".onnx")):
        return "dense"
    return "compressed"


def _conditions(said: Mapping[str, Any]) -> str:
    words = [text(said, "model"), text(said, "processor")]
    for key, form in (("isa", "{} kernels"), ("n_images", "{:,} images"), ("n_tokens", "{:,} tokens")):
        value = text(said, key) or figure(said, key)
        words.append(form.format(int(value) if isinstance(value, float) else value) if value else None)
    for key in ("threads", "batch"):
        value = figure(said, key)
        words.append(f"{key} {value:g}" if value else None)
    return ", ".join(word for word in words if word)
