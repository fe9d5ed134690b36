"""Compression of a whole model: block after block, each layer from the inputs that the compressed blocks before it give."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.calibration.paths import CompressedPath, DensePath
from vitoats.calibration.targets import FROM_DENSE_PATH, OutputError, Target, corrected, layer_inputs
from vitoats.common.errors import InputError
from vitoats.common.memory import return_freed_memory
from vitoats.compression.estimates import MemoryEstimate, count_passes, estimate_memory, estimate_work
from vitoats.format.layers import SparseLowRankLinear, replace_module
from vitoats.methods.registry import Decomposition, Method, get_method, measured
from vitoats.methods.statistics import InputStatistics, Needs
from vitoats.models.adapter import LinearLayer, ModelAdapter, adapt
from vitoats.models.units import places

if TYPE_CHECKING:
    from vitoats.compression.resume import BlockStore

log = logging.getLogger("vitoats")

MEMORY_SHARE = 0.5  # of the machine's, below which what would be needed again is kept, unless a limit is given
Budget = dict[str, float]  # of one layer: some of compression and rank_ratio
Progress = Callable[[int, int, str], None]  # block, number of blocks, what is being done


@dataclass(frozen=True)
class LayerRow:
    """Figures of one compressed layer.

    Attributes:
        name: dotted name in the model.
        d_out: rows of W.
        d_in: columns of W.
        ranks: rank of each row block (three for a fused qkv).
        nonzeros: of S.
        kept_parameters: nonzeros + sum of r_i (d_i + d_in).
        relative_error: as the method measures it (``Decomposition``). With H it is the layer's relative output error
            ||X (W - S - UV)^T||_F / ||X W^T||_F; with the diagonal alone ||(W - S - UV) D||_F / ||W D||_F, D the root of the
            inputs' second moments, which leaves out how inputs correlate. W is what the target makes of the dense weights
            (``vitoats.calibration.targets``), and where the bias is refitted the moments are those about the mean.
        steps: iterations of the solver, the most of its row blocks.
        seconds: spent in the solver.
    """

    name: str
    d_out: int
    d_in: int
    ranks: tuple[int, ...]
    nonzeros: int
    kept_parameters: int
    relative_error: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did.

    Attributes:
        layers: one row a compressed layer, in order.
        skipped: (name, reason) of the layers that stay dense.
        compression: the share of weights removed from the compressed layers, as it came out.
        n_images: how many images calibrated it.
        seconds: in all, loading apart.
    """

    layers: list[LayerRow]
    skipped: list[tuple[str, str]]
    compression: float
    n_images: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def compress(
    model: nn.Module,
    images: Iterator[Tensor],
    *,
    method: str,
    config: Any,
    img_size: int,
    nsamples: int,
    batch_size: int = 64,
    fused_qkv: bool = False,
    target: Target = "block",
    refit_bias: bool = False,
    budgets: dict[str, Budget] | None = None,
    memory_limit: float | None = None,
    scratch: Path | None = None,
    state: "BlockStore | None" = None,
    progress: Progress = lambda *_: None,
) -> CompressionReport:
    """Compresses a model in place.

    Args:
        model: a vision transformer in eval mode, on the device where the work is done.
        images: batches of calibration images [b, 3, img_size, img_size].
        method: a registered method's name, or ./file.py:name.
        config: that method's config.
        img_size: in pixels.
        nsamples: how many images ``images`` yields at most.
        batch_size: how many images a block runs on at a time.
        fused_qkv: decompose a fused qkv as one matrix; by default q, k and v apart, as the paper does.
        target: what a layer is to put out, and from which inputs (``vitoats.calibration.targets``).
        refit_bias: let the bias take up the mean of what a layer loses, so that its weights need only care for what varies.
        budgets: settings of single layers by name, in the place of the config's; all of the config's by default.
        memory_limit: bytes; if the estimate is above it, hidden states go to a file in ``scratch`` instead.
        scratch: a folder with room for that file.
        state: keeps finished blocks, and gives back those of an interrupted run.
        progress: told what is being done.

    Raises:
        InputError: the model has no chain of blocks, or weights or activations are not finite.
        RunError: no room for the hidden states.
    """
    start = time.perf_counter()
    solver = get_method(method)
    adapter = adapt(model, img_size)
    linears = [[LinearLayer(x.name, 1) if fused_qkv else x for x in block] for block in adapter.linears]
    linears, left_dense = chosen_layers(adapter, linears, solver, config)
    configs = {x.name: replace(config, **(budgets or {}).get(x.name, {})) for block in linears for x in block}
    two_paths = target in FROM_DENSE_PATH
    needs: Needs = "full" if two_paths or refit_bias else solver.needs
    if solver.needs == "neurons" and needs == "full":
        raise InputError(f"the method {method} knows nothing of means: leave `refit_bias` out, and `target` at 'block'")
    factors = 0
    for layer in [x for block in linears for x in block]:  # a budget that leaves nothing shows before the work starts
        module = adapter.linear(layer)
        d_out, d_in = module.out_features // layer.parts, module.in_features
        factors += layer.parts * configs[layer.name].budget(d_out, d_in).rank * (d_out + d_in)
    estimate = estimate_memory(adapter, nsamples, batch_size, factors, config.total_compression(), needs, 1 + two_paths)
    keep = two_paths and estimate.total <= (memory_limit or MEMORY_SHARE * _memory())
    spill_to = plan_memory(estimate if keep else replace(estimate, kept=0), memory_limit, scratch)
    passes = count_passes(adapter, linears, target, keep)
    log.info("arithmetic: %s", estimate_work(adapter, linears, configs, nsamples, img_size, needs, passes, two_paths))
    return_freed_memory()
    n_blocks = len(linears)
    progress(0, n_blocks, "reading images")
    hidden = HiddenStates.collect(adapter, images, nsamples, batch_size, spill_to)
    path = CompressedPath(hidden, keep)
    dense = DensePath(hidden.copy(spill_to), keep) if two_paths else None

    rows: list[LayerRow] = []
    for index, block in enumerate(linears):
        finished = state.load(index, [x.name for x in block]) if state else None
        if dense:
            dense.enter(adapter, index, [] if finished else block, residual=target == "residual")
        return_freed_memory()
        if finished:
            progress(index, n_blocks, "resuming")
            layers, block_rows = finished
            for name, compressed in layers.items():
                replace_module(model, name, compressed.to(hidden.device))
        else:
            progress(index, n_blocks, "calibrating")
            layers, block_rows = {}, []
            for linear, statistics, error in layer_inputs(adapter, index, block, path, dense, target, needs):
                progress(index, n_blocks, linear.name)
                compressed, row = _compress_layer(
                    adapter.linear(linear), linear, statistics, error, refit_bias, solver, configs[linear.name]
                )
                replace_module(model, linear.name, compressed.to(hidden.device))
                layers[linear.name] = compressed
                block_rows.append(row)
                progress(index, n_blocks, "calibrating")
            if state:
                state.save(index, layers, block_rows)
        rows += block_rows
        if index + 1 < n_blocks:
            progress(index, n_blocks, "propagating")
            path.leave(adapter, index)
            if dense:
                dense.leave(adapter, index)
    progress(n_blocks, n_blocks, "done")
    total = sum(row.d_out * row.d_in for row in rows)
    kept = sum(row.kept_parameters for row in rows)
    return CompressionReport(rows, adapter.skipped + left_dense, 1 - kept / total, hidden.n_images, time.perf_counter() - start)


def chosen_layers(
    adapter: ModelAdapter, linears: list[list[LinearLayer]], method: Method, config: Any
) -> tuple[list[list[LinearLayer]], list[tuple[str, str]]]:
    """The layers that the method compresses, block by block, and (name, reason) of those it leaves dense.

    Raises:
        InputError: it leaves all of them dense, or is not for this model.
    """
    where = places(adapter.model, adapter.block_names)
    reasons = {x.name: method.left_dense(where.get(x.name, "other"), config) for block in linears for x in block}
    chosen = [[x for x in block if reasons[x.name] is None] for block in linears]
    if not any(chosen):
        raise InputError("the method leaves all layers of this model dense: use another `method`")
    return chosen, [(name, reason) for name, reason in reasons.items() if reason is not None]


def _memory() -> int:
    """Bytes of the machine's memory, or of the container's share of it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return physical


def plan_memory(estimate: MemoryEstimate, limit: float | None, scratch: Path | None) -> Path | None:
    """Says what memory it will take; returns where hidden states go if that is above the limit."""
    log.info("memory: %s", estimate)
    if limit is None or estimate.total <= limit:
        return None
    if estimate.total - estimate.hidden > limit:
        log.warning("the rest alone is above the memory limit of %.2f GB: lower `batch_size`", limit / 1e9)
    if scratch is None:
        raise InputError("a memory limit needs a folder for the hidden states: give scratch")
    log.info("hidden states go to a mapped file in %s, to stay below %.2f GB", scratch, limit / 1e9)
    return scratch


def _keep_all(weight: Tensor, statistics: InputStatistics, _config: Any) -> Decomposition:
    """What any method comes to where nothing is removed."""
    return measured(weight, statistics, weight)


@torch.inference_mode()
def _compress_layer(
    module: nn.Linear,
    linear: LinearLayer,
    statistics: InputStatistics,
    error: OutputError | None,
    refit_bias: bool,
    method: Method,
    config: Any,
) -> tuple[SparseLowRankLinear, LayerRow]:
    start = time.perf_counter()
    weight = module.weight.detach().float()
    bias: Tensor | None = module.bias
    statistics = statistics.to(weight.device)
    refit_bias = refit_bias and bias is not None
    if error is not None:
        weight, bias = corrected(weight, bias, statistics, error.to(weight.device), refit_bias)
    moments = statistics.centred() if refit_bias else statistics
    if method.needs == "diagonal":
        moments = InputStatistics(moments.second_moment)
    try:
        solve = method.solve if config.total_compression() > 0 else _keep_all
        parts: list[Decomposition] = [solve(w, moments, config) for w in weight.chunk(linear.parts)]
    except InputError as refusal:
        raise InputError(f"{linear.name}: {refusal}") from None
    if refit_bias and bias is not None:
        lost = torch.cat([w - p.S - p.U @ p.V for w, p in zip(weight.chunk(linear.parts), parts, strict=True)])
        bias = bias + statistics.mean_output(lost).to(bias)
    layer = SparseLowRankLinear.from_decompositions(parts, bias)
    total = sum(p.objective / p.relative_error**2 for p in parts if p.relative_error)
    return layer, LayerRow(
        name=linear.name,
        d_out=weight.shape[0],
        d_in=weight.shape[1],
        ranks=tuple(p.U.shape[1] for p in parts),
        nonzeros=layer.nonzeros,
        kept_parameters=layer.kept_parameters,
        relative_error=(sum(p.objective for p in parts) / total) ** 0.5 if total else 0.0,
        steps=max(p.steps for p in parts),
        seconds=time.perf_counter() - start,
    )
