"""Makes the inputs of a block's layers easier to quantize (SmoothQuant, arXiv 2211.10438).

A token x is quantized with one scale, that of its largest entry, so a channel of outliers costs all others their precision.
Where x comes from a layer norm and goes to one linear layer alone, dividing channel j of the norm's weight and bias by s_j, and
multiplying column j of W by it, changes x and nothing else:

    s_j = sqrt(max |x_j| / max_i |W_ij|)    rounded to a power of two, so that products keep all their bits
"""

import torch
from torch import Tensor, nn

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.common import ranks
from vitoats.models.blocks import Block
from vitoats.models.hooks import watch_inputs, watch_outputs

TRIAL_IMAGES = 2  # to check that a block computes the same as before
TOLERANCE = 1e-5  # of that check, relative to the largest output
MOST = 24  # the largest power of two


@torch.inference_mode()
def smooth(block: Block, hidden: HiddenStates, layers: list[str]) -> dict[str, Tensor]:
    """Smooths the inputs of a block's dense layers in place.

    Args:
        block: the dense block.
        hidden: the hidden states before it.
        layers: names of the layers that will quantize their inputs.

    Returns:
        the norms' changed parameters by name. Norms that feed more than one layer are left as they are.
    """
    model, sample = block.model, hidden.of_images(count=TRIAL_IMAGES)
    found = _norms(block, sample, layers)
    largest: dict[str, Tensor] = {}

    def measure(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).abs().amax(dim=0)
        largest[name] = torch.maximum(largest.get(name, x), x)

    with watch_inputs({name: model.get_submodule(name) for name in found}, measure):
        for batch in hidden.batches():
            block.run(batch)
    expected = block.run(sample)
    changed: dict[str, Tensor] = {}
    for layer, norm in found.items():
        parameters, weight = dict(model.get_submodule(norm).named_parameters()), model.get_parameter(f"{layer}.weight").data
        s = _scales(ranks.maximum(largest[layer]), weight.abs().amax(dim=0))
        _move(s, parameters, weight)
        difference = (block.run(sample) - expected).abs().max()
        if difference <= TOLERANCE * expected.abs().max():
            changed |= {f"{norm}.{name}": parameter.data for name, parameter in parameters.items()}
        else:  # something else reads this norm, too
            _move(1 / s, parameters, weight)
    return changed


def _norms(block: Block, sample: Tensor, layers: list[str]) -> dict[str, str]:
    """The layer norm whose output each of these layers takes as it is, by the layer's name."""
    norms = {
        name: module
        for name, module in block.module.named_modules(prefix=block.name)
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine
    }
    outputs: list[tuple[str, Tensor]] = []
    found: dict[str, str] = {}

    def match(layer: str, x: Tensor) -> None:
        found.update((layer, norm) for norm, output in outputs if output is x)

    with (
        watch_outputs(norms, lambda name, _x, y: outputs.append((name, y))),
        watch_inputs({name: block.model.get_submodule(name) for name in layers}, match),
    ):
        block.run(sample)
    return {layer: norm for layer, norm in found.items() if list(found.values()).count(norm) == 1}


def _scales(inputs: Tensor, weights: Tensor) -> Tensor:
    """s [d_in], from the largest magnitudes of each input and of its weights."""
    powers = (inputs / weights).sqrt().log2().round().clamp(-MOST, MOST)
    return torch.where((inputs > 0) & (weights > 0) & torch.isfinite(powers), powers, 0).exp2()


def _move(s: Tensor, norm: dict[str, nn.Parameter], weight: Tensor) -> None:
    for parameter in norm.values():
        parameter.data.div_(s)
    weight.mul_(s)
