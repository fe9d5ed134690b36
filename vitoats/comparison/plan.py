"""The runs of a comparison: methods x patterns x compressions, each a ``CompressionJob``."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitoats.common.errors import InputError
from vitoats.compression.job import CompressionJob
from vitoats.compression.settings import make_job, with_method
from vitoats.methods.registry import find_method

OWN = "own"  # as a pattern: each method's own default


@dataclass(frozen=True)
class Run:
    """One run of one method.

    Attributes:
        label: the method's name in the tables.
        pattern: the requested pattern; "own" for the method's own default.
        compression: the requested compression; None if an N:M pattern implies it.
        job: the compression job.
    """

    label: str
    pattern: str
    compression: float | None
    job: CompressionJob

    @property
    def name(self) -> str:
        """The run's name in file names."""
        pattern = self.pattern.replace(":", "of")
        parts = [self.label, pattern] if self.compression is None else [self.label, pattern, f"{self.compression:g}"]
        return re.sub(r"[^\w.+-]", "_", "-".join(parts))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the result depends on and that the runs do not share."""
        job = self.job
        return {
            "method": job.method,
            "method_digest": job.method_digest,
            "fused_qkv": job.fused_qkv,
            "weights": job.weights,
            "general_images": job.image_data.general_images,
            "limit": job.to_dict()["limit"],
            **dataclasses.asdict(job.recipe),
            **dataclasses.asdict(job.config),
        }

    def __str__(self) -> str:
        pattern = "" if self.pattern == OWN else f" {self.pattern}"
        return f"{self.label}{pattern}" + ("" if self.compression is None else f" at {self.compression:g}")


def plan(
    shared: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    patterns: list[str],
    compressions: list[float],
) -> tuple[list[Run], list[str]]:
    """All runs, and a line for each pattern that a method does not support.

    Args:
        shared: arguments of ``make_job`` that all runs share: model, images, seed, ...
        methods: the settings of each method by its label, including "method".
        patterns: "own", or patterns as the methods take them.
        compressions: shares of the weights to remove; N:M patterns imply their own.

    Raises:
        InputError: a method is unknown, or a setting is invalid or unknown to its method.
    """
    base = make_job(**shared)
    runs: list[Run] = []
    skipped: list[str] = []
    for label, own in methods.items():
        for pattern in patterns:
            for compression in [None] if ":" in pattern else compressions:
                run = _run(base, label, own, pattern, compression)
                if isinstance(run, Run):
                    runs.append(run)
                elif run not in skipped:
                    skipped.append(run)
    if not runs:
        raise InputError(f"nothing is left to run ({'; '.join(skipped)}): add {OWN} to `patterns`")
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            raise InputError(f"two runs would be called {run.name}: name one of the methods anew (`methods` NEW_NAME=METHOD)")
    return runs, skipped


def _run(base: CompressionJob, label: str, own: Mapping[str, Any], pattern: str, compression: float | None) -> Run | str:
    """A run, or the reason why it is left out."""
    method = find_method(own["method"])
    if pattern != OWN and "pattern" not in {field.name for field in dataclasses.fields(method.config)}:
        return f"{label} is left out for the pattern {pattern}: it takes no pattern"
    if ":" in pattern and own.get("allocation", "uniform") != "uniform":
        return f"{label} is left out for the pattern {pattern}: N:M leaves nothing to allocate"
    settings = dict(own)
    if compression is not None:
        settings["compression"] = compression
    if pattern != OWN:
        settings["pattern"] = pattern
    try:
        return Run(label, pattern, compression, with_method(base, settings.pop("method"), **settings))
    except InputError as error:
        where = f"{label}, pattern {pattern}" + ("" if compression is None else f", compression {compression:g}")
        raise InputError(f"{where}: {error} (settings of one method: `options` {label}:NAME=VALUE,...)") from None
