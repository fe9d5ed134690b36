"""A compression as one frozen value: its model, images, method and limits.

``settings.make_job`` fills in the method's defaults, and ``run.run`` carries the job out. Resume and the caches identify a job
by its JSON. ``dataclasses.replace(job, ...)`` makes a variant.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitoats.common.errors import InputError
from vitoats.loading.source import ModelSource
from vitoats.methods.registry import Recipe


def _check_whole(name: str, value: Any, least: int, below: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < below:
        most = "" if below == math.inf else f", below {below}"
        raise InputError(f"{value!r} is wrong: give `{name}` a whole number of {least} or more{most}")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{value!r} is wrong: give `{name}` a number above 0")


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """The calibration images.

    Attributes:
        images: a folder, or "sample"; a description if they are given in memory.
        general_images: a folder of varied images, for the calibration mixes that use them.
        nsamples: total number of calibration images.
        seed: seed of the draw and of the synthetic images.
    """

    images: str
    general_images: str | None = None
    nsamples: int = 512
    seed: int = 42

    def __post_init__(self):
        _check_whole("nsamples", self.nsamples, 1)
        _check_whole("seed", self.seed, 0, 2**63)


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """The calibration text of a language model.

    Attributes:
        texts: files or folders, or "sample", each used in equal shares; a description if they are given in memory.
        seq_len: tokens of a window; None for 2048, or the model's positions if these are fewer.
        nsamples: total number of calibration windows.
        seed: seed of the draw.
    """

    texts: tuple[str, ...]
    seq_len: int | None = None
    nsamples: int = 128
    seed: int = 42

    def __post_init__(self):
        _check_whole("nsamples", self.nsamples, 1)
        _check_whole("seed", self.seed, 0, 2**63)
        if self.seq_len is not None:
            _check_whole("seq_len", self.seq_len, 2)


@dataclass(frozen=True)
class CostLimit:
    """A limit on the cost of the exported model, instead of a compression.

    Attributes:
        kind: "speedup" over the dense model, "max_ms" or "max_mb".
        value: the limit.
        cost_table: measured on another machine or with another batch size (``benchmark.costs``); None measures here, on one
            image.
        free_rank_ratio: whether layers may also do without a low-rank term, if that is better.
    """

    kind: Literal["speedup", "max_ms", "max_mb"]
    value: float
    cost_table: Path | None = None
    free_rank_ratio: bool = True

    def __post_init__(self):
        _check_positive(self.kind, self.value)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The resources that a compression may use; they affect only the last bits of the result.

    Attributes:
        batch_size: images, or windows of text, at a time.
        workers: processes that read images.
        device: the torch device.
        threads: CPU threads; 0 uses all cores.
        memory_limit: GB (10^9 bytes) above which hidden states go to a mapped file; a job that takes more even so is refused.
            None sets no limit.
    """

    batch_size: int = 64
    workers: int = 0
    device: str = "cpu"
    threads: int = 0
    memory_limit: float | None = None

    def __post_init__(self):
        _check_whole("batch_size", self.batch_size, 1)
        _check_whole("workers", self.workers, 0)
        _check_whole("threads", self.threads, 0)
        if self.memory_limit is not None:
            _check_positive("memory_limit", self.memory_limit)

    @property
    def memory_limit_bytes(self) -> float | None:
        """The memory limit in bytes."""
        return None if self.memory_limit is None else self.memory_limit * 1e9


@dataclass(frozen=True, kw_only=True)
class CompressionJob:
    """A whole compression.

    Attributes:
        model: where the dense model comes from.
        data: the calibration images or text.
        method: its registered name, or ./file.py:name.
        method_digest: SHA-256 of a user's own method file, "" for built-in methods.
        config: the method's frozen config; a limit overrides its compression.
        recipe: how the method is used on the whole model.
        limit: cost limit of the exported model; None if the config's compression decides how much is removed.
        fused_qkv: decompose a fused qkv as one matrix, not q, k and v separately.
        weights: how the weights of compressed layers are stored; with int8, these layers also quantize their inputs.
        resources: the resources it may use.
    """

    model: ModelSource
    data: CalibrationData | CalibrationText
    method: str
    method_digest: str
    config: Any
    recipe: Recipe
    limit: CostLimit | None = None
    fused_qkv: bool = False
    weights: Literal["float32", "int8"] = "float32"
    resources: Resources = Resources()

    def __post_init__(self):
        if self.weights not in ("float32", "int8"):
            raise InputError(f"{self.weights!r} is wrong: `weights` takes float32, int8")

    @property
    def image_data(self) -> CalibrationData:
        """The calibration images of a vision model.

        Raises:
            InputError: it is a language model.
        """
        if isinstance(self.data, CalibrationText):
            raise InputError(f"{self.model.name} is a language model, which takes no images: use compress or compare_lm")
        return self.data

    @property
    def int8(self) -> bool:
        """Whether weights are rounded to int8."""
        return self.weights == "int8"

    def to_dict(self) -> dict[str, Any]:
        """Everything the result depends on, as plain values for JSON; resources are left out."""
        described = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "resources"}
        return {name: _plain(value) for name, value in described.items()}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, Path) else value
