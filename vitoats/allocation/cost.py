"""The cost of an exported linear layer: bytes of its weights, and milliseconds from a measured table.

With nnz(S) values, r (d_out + parts d_in) values in U and V, and one bit per weight, the exported layer takes

    bytes = 4 (nnz(S) + r (d_out + parts d_in)) + d_out ceil(d_in / 8)          or 4 d_out d_in as a plain matrix
    ms    = f(nnz(S) / (d_out d_in)) + g(r (d_out + parts d_in))

where f interpolates linearly between the measured densities of S, and g is a straight line fitted to the measured extra time of
low-rank terms. A layer whose values and mask would take as many bytes as the matrix is exported as a matrix
(``vitoats.format.layers``), and then costs a dense product.

With int8 weights f, g and the dense product are those of the int8 operators. The bytes are those of their constants and scales,
padded to whole strips of 16 rows and quads of 4 columns:

    bytes = nnz(S) + d_out d_in / 8 + r (d_out + parts d_in) + 4 (2 d_out + parts r)       or d_out d_in + 4 d_out as a matrix
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vitoats.common.errors import InputError
from vitoats.common.json_files import LARGEST, parse_json
from vitoats.common.plain_values import item, number, rows, text, whole
from vitoats.common.whole_files import read_text
from vitoats.format import bitmask
from vitoats.methods.sparsity import Pattern
from vitoats.models.shapes import LayerShape


@dataclass(frozen=True)
class LayerFootprint:
    """What a compressed layer holds: non-zeros of S, and the elements of U and V."""

    nonzeros: int
    low_rank: int

    @property
    def parameters(self) -> int:
        """Number of parameters, as OATS counts them."""
        return self.nonzeros + self.low_rank


def footprint(shape: LayerShape, config: Any) -> LayerFootprint:
    """The footprint of a layer that a method compresses with a config.

    Raises:
        InputError: nothing would be left of the layer.
    """
    rows = shape.d_out // shape.parts
    budget = config.budget(rows, shape.d_in)
    pattern = Pattern.parse(getattr(config, "pattern", "row"))
    groups = {"layer": 1, "N:M": rows * shape.d_in // max(1, pattern.m)}.get(pattern.kind, rows)
    return LayerFootprint(shape.parts * groups * budget.kept_per_group, shape.low_rank_parameters(budget.rank))


def dense(shape: LayerShape) -> LayerFootprint:
    """The footprint of a layer that keeps all its weights."""
    return LayerFootprint(shape.size, 0)


def exported_dense(shape: LayerShape, kept: LayerFootprint, int8: bool = False) -> bool:
    """Whether a layer that keeps this much is exported as a plain matrix, of float32 or int8."""
    return not bitmask.saves(shape.d_out, shape.d_in, kept.parameters, each=1 if int8 else 4)


def exported_bytes(shape: LayerShape, kept: LayerFootprint) -> float:
    """Bytes of a layer's exported float32 weights."""
    return 4 * shape.size if exported_dense(shape, kept) else bitmask.packed_bytes(shape.d_out, shape.d_in, kept.parameters)


def exported_int8_bytes(shape: LayerShape, kept: LayerFootprint) -> float:
    """Bytes of a layer's exported int8 weights and their scales, with the padding of their layout."""
    rows, columns = _padded(shape.d_out, 16), _padded(shape.d_in, 4)
    if exported_dense(shape, kept, int8=True):
        return rows * columns + 4 * shape.d_out
    rank = max(1, kept.low_rank // shape.low_rank_parameters(1))  # where there is no low-rank term, one of zeros is exported
    low_rank = rows * _padded(rank, 4) + shape.parts * _padded(rank, 16) * columns
    return kept.nonzeros + rows * columns / 8 + low_rank + 4 * (2 * shape.d_out + shape.parts * rank)


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class ShapeTimes:
    """Measured milliseconds of one layer shape.

    Attributes:
        shape: the layer's shape.
        layers: how many layers of the model have it.
        dense_ms: milliseconds as a dense MatMul.
        rows: (density of S, elements of U and V, ms), with at least two densities without a low-rank term.
        dense_int8_ms: milliseconds as a dense product in int8, if the rows are those of int8 weights; None if of float32.
    """

    shape: LayerShape
    layers: int
    dense_ms: float
    rows: tuple[tuple[float, int, float], ...]
    dense_int8_ms: float | None = None

    @cached_property
    def sparse(self) -> tuple[np.ndarray, np.ndarray]:
        """Increasing densities, and the ms of S alone, made non-decreasing."""
        rows = sorted((density, ms) for density, low_rank, ms in self.rows if not low_rank)
        densities, ms = np.array(rows).T
        return densities, np.maximum.accumulate(ms)

    @cached_property
    def low_rank(self) -> tuple[float, float]:
        """(constant ms, ms per element of U and V) of the line fitted to what low-rank terms add; neither is negative."""
        added = [(low_rank, ms - self._of_density(density)) for density, low_rank, ms in self.rows if low_rank]
        if not added:
            return 0.0, 0.0
        sizes, extra = np.array(added).T
        if len(set(sizes)) > 1:
            slope, start = np.polyfit(sizes, extra, 1)
            if start >= 0 and slope >= 0:
                return float(start), float(slope)
        return 0.0, max(0.0, float((sizes * extra).sum() / (sizes * sizes).sum()))  # noise: through the origin

    def _of_density(self, density: float) -> float:
        """Milliseconds of S alone: linear between measured densities, and extrapolated with the slopes at the ends."""
        d, ms = self.sparse
        low, high = (ms[1] - ms[0]) / (d[1] - d[0]), (ms[-1] - ms[-2]) / (d[-1] - d[-2])
        found = np.interp(density, d, ms) + low * min(density - d[0], 0) + high * max(density - d[-1], 0)
        return max(0.0, float(found))

    def ms(self, kept: LayerFootprint) -> float:
        """Milliseconds of one layer that keeps this much."""
        if exported_dense(self.shape, kept, self.dense_int8_ms is not None):
            return self.dense_ms if self.dense_int8_ms is None else self.dense_int8_ms
        start, slope = self.low_rank
        return self._of_density(kept.nonzeros / self.shape.size) + (start + slope * kept.low_rank if kept.low_rank else 0.0)


@dataclass(frozen=True)
class CostTable:
    """What ``tools/benchmark.py op --model`` measured on one machine, for weights of one type, float32 or int8.

    Attributes:
        processor, threads, batch: the processor, number of threads and batch size of the measurement.
        dense_ms: milliseconds of the whole dense model, in float32.
        rest_ms: milliseconds of the sparse model without its linear layers.
        times: measured times by layer shape.
    """

    processor: str
    threads: int
    batch: int
    dense_ms: float
    rest_ms: float
    times: dict[LayerShape, ShapeTimes]

    @classmethod
    def from_json(cls, result: Any, int8: bool = False) -> "CostTable":
        """Reads the command's JSON, which holds the times of both types of weights.

        Raises:
            ValueError: ``result`` is not a cost table.
        """
        grouped: dict[LayerShape, list[Any]] = {}
        for row in rows(item(result, "rows"), "rows"):
            shape = LayerShape(*(whole(item(row, key), key, 1) for key in ("n", "k", "blocks", "tokens")))
            if shape.d_out % shape.parts:
                raise ValueError(f"{shape.d_out} rows are not {shape.parts} equal blocks")
            grouped.setdefault(shape, []).append(row)
        return cls(
            processor=text(item(result, "processor"), "processor"),
            threads=whole(item(result, "threads"), "threads", 1),
            batch=whole(item(result, "batch"), "batch", 1),
            dense_ms=number(item(result, "dense_ms"), "dense_ms", above=0),
            rest_ms=number(item(result, rest := "rest_int8_ms" if int8 else "rest_ms"), rest),  # a difference of measurements
            times={shape: _times(shape, rows_of_shape, int8) for shape, rows_of_shape in grouped.items()},
        )

    @classmethod
    def of_model(cls, result: Any, shapes: list[LayerShape], int8: bool = False) -> "CostTable":
        """Reads the command's JSON, for a model whose compressible layers have these shapes.

        Raises:
            ValueError: ``result`` is not a cost table, or is for another model.
        """
        table = cls.from_json(result, int8)
        if different := table.difference(shapes):
            raise ValueError(different)
        return table

    @classmethod
    def read(cls, path: Path, int8: bool = False) -> "CostTable":
        """Reads the file that the command wrote.

        Raises:
            InputError: the file is unreadable, or holds something else.
        """
        try:
            return cls.from_json(parse_json(read_text(path, LARGEST)), int8)
        except OSError as error:
            raise InputError(f"the cost table {path} cannot be read ({error.strerror}): {_remedy(path)}") from None
        except UnicodeDecodeError:
            raise InputError(f"{path} holds no cost table (it is no text): {_remedy(path)}") from None
        except ValueError as error:
            raise InputError(f"{path} holds no cost table ({error}): {_remedy(path)}") from None

    def check(self, shapes: list[LayerShape], path: Path) -> None:
        """Refuses a model with other layers.

        Args:
            shapes: shapes of all compressible layers of the model, with a fused qkv in its parts.
            path: the table's path.

        Raises:
            InputError: the table has other shapes, or other numbers of layers.
        """
        if different := self.difference(shapes):
            raise InputError(f"the cost table {path} is not of this model: {different}: {_remedy(path)}")

    def difference(self, shapes: list[LayerShape]) -> str | None:
        """How a model's layers differ from the measured ones, in words; None if they do not."""
        for shape in sorted(set(shapes)):
            found = self.times[shape].layers if shape in self.times else 0
            if found != shapes.count(shape):
                return f"it has {found} layers of {shape} for {shape.tokens} tokens, the model {shapes.count(shape)}"
        return None

    def ms(self, shape: LayerShape, kept: LayerFootprint) -> float:
        """Milliseconds of one layer, regardless of how many parts it was split into."""
        times = self.times.get(shape) or next(
            t for s, t in self.times.items() if (s.d_out, s.d_in, s.tokens) == (shape.d_out, shape.d_in, shape.tokens)
        )
        return times.ms(kept)


def _times(shape: LayerShape, measured: list[Any], int8: bool) -> ShapeTimes:
    sparse, whole_layers = ("sparse_int8_ms", ("dense_ms", "dense_int8_ms")) if int8 else ("sparse_ms", ("dense_ms",))
    layers = {whole(item(row, "layers"), "layers", 1) for row in measured}
    dense_ms = {tuple(number(item(row, key), key, above=0) for key in whole_layers) for row in measured}
    if len(layers) > 1 or len(dense_ms) > 1:
        raise ValueError(f"rows of {shape} contradict each other")
    times: dict[tuple[float, int], float] = {}
    for row in measured:
        zeros = number(item(row, "zeros"), "zeros", least=0)
        low_rank = shape.low_rank_parameters(whole(item(row, "rank"), "rank"))
        if zeros >= 100 or (1 - zeros / 100, low_rank) in times:
            raise ValueError(f"{zeros:g} % zeros of {shape} stand there twice, or are all")
        times[1 - zeros / 100, low_rank] = number(item(row, sparse), sparse, above=0)
    if len({density for density, low_rank in times if not low_rank}) < 2:
        raise ValueError(f"{shape} was not measured at two densities")
    float32, *of_int8 = dense_ms.pop()
    return ShapeTimes(shape, layers.pop(), float32, tuple((*key, ms) for key, ms in times.items()), *of_int8)


def _remedy(path: Path) -> str:
    return f"make one with tools/benchmark.py op --model NAME --results-file {path} (and the same image size)"
