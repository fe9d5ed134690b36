"""How a layer's error falls with the solver's iterations: one layer is solved again with 1, 2, 4, ... of them.

A folder records only how many iterations each layer took. Methods are pure functions with ``iterations`` in their config, so
the curve needs nothing but the layer's weights and inputs: those of the dense model on sample data.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.common.errors import InputError, one_line
from vitoats.methods.registry import Method, find_method
from vitoats.methods.statistics import InputStatistics
from vitoats.models.hooks import watch_inputs
from vitoats.report.page.document import Chart, Missing, Section, Table
from vitoats.report.page.sources import Layer, Run, text

MOST_WORK = 3e12  # multiply-adds, about a minute on one core
MOST_ITERATIONS = 1000


def cheapest(run: Run) -> Layer:
    """The layer that is solved again: the smallest of the middle block."""
    blocks = list(dict.fromkeys(layer.block for layer in run.layers))
    sizes = {row["name"]: row["d_out"] * row["d_in"] for row in run.about["layers"]}
    return min((layer for layer in run.layers if layer.block == blocks[len(blocks) // 2]), key=lambda layer: sizes[layer.name])


def convergence_section(run: Run, model: nn.Module, call: Callable[[], Any]) -> Section:
    """The section for a layer of a run; ``call`` runs the dense ``model`` on sample data."""
    lead = "The solver's error if it stops after so many iterations, on one layer that is solved again with sample inputs."
    section = Section("convergence", "Convergence", lead)
    try:
        layer = cheapest(run)
        method, config = config_of(run, layer.name)
        weight, height = _weight(model.get_submodule(layer.name), run.about["row_blocks"].get(layer.name))
        statistics = InputStatistics.of(inputs_to(model, layer.name, call))
        if run.about["recipe"].get("refit_bias") and getattr(model.get_submodule(layer.name), "bias", None) is not None:
            statistics = statistics.centred()
        curve = errors_by_iterations(method, weight[:height].float(), statistics, config)
    except InputError as error:
        section.parts.append(Missing(f"the curve: {error}"))
    except Exception as error:  # a config or a name of a damaged vitoats.json
        section.parts.append(Missing(f"the curve: {type(error).__name__}: {one_line(error, 100)}"))
    else:
        name = layer.name + (", its first part" if height < len(weight) else "")
        section.parts.append(convergence_chart(name, text(run.about, "method") or "", curve))
    return section


def config_of(run: Run, layer: str) -> tuple[Method, Any]:
    """The method of a run and its config for a layer.

    Raises:
        InputError: the method has no iterations, or is not one of vitoats' own.
    """
    name = text(run.about, "method") or ""
    method = None if "." in name or "/" in name else find_method(name)  # never a file that a folder names
    if not isinstance(method, Method):
        raise InputError(f"{name} decomposes no layers, or is a method of your own")
    said = {**run.about["config"], **((run.about.get("budgets") or {}).get(layer) or {})}
    config = method.config(**{field.name: said[field.name] for field in fields(method.config) if field.name in said})
    if not 2 <= getattr(config, "iterations", 0) <= MOST_ITERATIONS:
        raise InputError(f"{name} needs no iterations")
    return method, config


def inputs_to(model: nn.Module, layer: str, call: Callable[[], Any]) -> Tensor:
    """The inputs [n_tokens, d_in] of a layer while ``call`` runs the model."""
    seen: list[Tensor] = []
    with torch.inference_mode(), watch_inputs({layer: model.get_submodule(layer)}, lambda _, x: seen.append(x)):
        call()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).float()


def errors_by_iterations(method: Method, weight: Tensor, statistics: InputStatistics, config: Any) -> Mapping[int, float]:
    """The relative error that the method reaches with each number of iterations, until it stops by itself.

    Args:
        method: the method, whose config has ``iterations``.
        weight: [d_out, d_in].
        statistics: full moments of the input.
        config: the config with the largest number of iterations.

    Raises:
        InputError: it would take too long.
    """
    steps = [2**i for i in range(config.iterations.bit_length()) if 2**i < config.iterations] + [config.iterations]
    configs = [replace(config, iterations=n) for n in steps]
    work = sum(config.multiply_adds(*weight.shape) for config in configs) if hasattr(config, "multiply_adds") else 0
    if work > MOST_WORK:
        raise InputError(f"solving {weight.shape[0]} x {weight.shape[1]} again takes {work / 1e12:.0f} T multiply-adds")
    known = statistics if method.needs == "full" else statistics.diagonal()
    found: dict[int, float] = {}
    with torch.inference_mode():
        for config_ in configs:
            solved = method.solve(weight, known, config_)
            found[config_.iterations] = solved.relative_error
            if solved.steps < config_.iterations:  # more would give the same
                break
    return found


def convergence_chart(layer: str, method: str, curve: Mapping[int, float]) -> Chart:
    """The errors of a layer by iterations, on logarithmic axes."""
    spec = {
        "data": {"values": [{"iterations": n, "error": error} for n, error in curve.items()]},
        "mark": {"type": "line", "strokeWidth": 2, "point": {"size": 70, "filled": True}},
        "encoding": {
            "x": {
                "field": "iterations",
                "type": "quantitative",
                "title": "iterations (log scale)",
                "scale": {"type": "log", "base": 2, "nice": False, "padding": 12},
                "axis": {"values": list(curve), "format": "d", "labelOverlap": True},
            },
            "y": {"field": "error", "type": "quantitative", "title": "relative error", "scale": {"zero": False, "padding": 12}},
            "tooltip": [
                {"field": "iterations", "type": "quantitative"},
                {"field": "error", "type": "quantitative", "format": ".5f", "title": "relative error"},
            ],
        },
    }
    (first, start), (last, end) = next(iter(curve.items())), list(curve.items())[-1]
    alt = f"Relative error of {layer} by {method}: {start:.4f} after {first} iteration, {end:.4f} after {last}."
    table = Table(
        f"{method} on {layer}", ("iterations", "relative error"), [(f"{n}", f"{error:.5f}") for n, error in curve.items()]
    )
    return Chart(f"{method} on {layer}", alt, spec, table)


def _weight(module: nn.Module, parts: Any) -> tuple[Tensor, int]:
    """The weight [d_out, d_in] of a dense layer, and the height of its first part."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor):
        raise InputError("the dense model has no such linear layer")
    return weight.detach(), int(parts[0][0]) if parts else len(weight)
