"""What a compression is, in one frozen value: from which model, with which images, by which method, within which limits.

``settings.make_job`` fills in what a method decides by itself, ``run.run`` carries it out, and its JSON is what resume and the
caches know a compression by. Another compression of the same kind is ``dataclasses.replace(job, ...)``.
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
    """Which images calibrate.

    Attributes:
        images: a folder, or "sample"; a description where they are given in memory.
        general_images: a folder of varied images, for the calibration mixes that have some.
        nsamples: how many calibrate in all.
        seed: of the draw, and of the synthetic images.
    """

    images: str
    general_images: str | None = None
    nsamples: int = 512
    seed: int = 42

    def __post_init__(self):
        _check_whole("nsamples", self.nsamples, 1)
        _check_whole("seed", self.seed, 0, 2**63)


@dataclass(frozen=True)
class CostLimit:
    """What the exported model may cost, in the place of a compression.

    Attributes:
        kind: "speedup" over the dense model, "max_ms" or "max_mb".
        value: the limit.
        cost_table: measured on another machine or batch (``benchmark.costs``); None measures here, on one image.
        free_rank_ratio: layers may also do without a low-rank term, where that is better.
    """

    kind: Literal["speedup", "max_ms", "max_mb"]
    value: float
    cost_table: Path | None = None
    free_rank_ratio: bool = True

    def __post_init__(self):
        _check_positive(self.kind, self.value)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a compression may use; the result does not depend on it but for the last bits.

    Attributes:
        batch_size: images at a time.
        workers: processes that read images.
        device: of torch.
        threads: of the CPU; 0 takes all cores.
        memory_limit: GB (10^9 bytes), above which hidden states go to a mapped file; None sets no limit.
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


@dataclass(frozen=True, kw_only=True)
class CompressionJob:
    """A whole compression.

    Attributes:
        model: where the dense model comes from.
        data: what calibrates.
        method: its registered name, or ./file.py:name.
        method_digest: SHA-256 of a user's own method file, "" for ours.
        config: the method's frozen config; with a limit its compression is an outcome.
        recipe: how the method is used on the whole model.
        limit: what the exported model may cost; None where the config's compression says how much is removed.
        fused_qkv: decompose a fused qkv as one matrix, not q, k and v apart.
        resources: what it may use.
    """

    model: ModelSource
    data: CalibrationData
    method: str
    method_digest: str
    config: Any
    recipe: Recipe
    limit: CostLimit | None = None
    fused_qkv: bool = False
    resources: Resources = Resources()

    def to_dict(self) -> dict[str, Any]:
        """All that the result depends on, as plain values for JSON; resources are left out."""
        described = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "resources"}
        return {name: _plain(value) for name, value in described.items()}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, Path) else value
