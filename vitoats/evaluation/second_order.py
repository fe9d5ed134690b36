"""What compressing a single layer does to a language model's predictions, estimated from gradients: no changed model runs.

If a layer's outputs change by d[t] for each token t, then to second order

    mean over tokens of KL(dense || changed) = 1/2 mean over t of E (g[t] . d[t])^2,

where g[t] is the gradient, with respect to the layer's output for t, of the log probability of a window whose labels are drawn
from the model's own predictions: the Fisher information (Amari, "Natural gradient works efficiently in learning", 1998). The
changes of different tokens are assumed to be uncorrelated, and labels are drawn once. Then one pass forward and one backward
serve all layers at all rates. Large errors are underestimated.
"""

import torch
from torch import Tensor

from vitoats.evaluation.effect import LayerEffects
from vitoats.models.blocks import Block, LinearLayer, ModelAdapter
from vitoats.models.hooks import watch_outputs
from vitoats.models.inputs import TextInputs
from vitoats.models.on_disk import held


class PredictionEffects:
    """The Kullback-Leibler divergence of the next token's distribution from the dense model's: mean over tokens, in nats."""

    def __init__(self, adapter: ModelAdapter, hidden: Tensor):
        """Runs the dense model forward and backward. In memory is one gradient for each block's output.

        Args:
            adapter: the dense model, of text.
            hidden: the hidden states [n, t, width] of some windows before the first block.
        """
        self.blocks = adapter.blocks
        before = [hidden]
        for block in self.blocks:
            with held(block.module):
                before.append(torch.cat([block.run(window) for window in before[-1].split(1)]))
        gradients = [_gradient_of_predictions(adapter, before.pop())]
        for block in self.blocks[:0:-1]:
            with held(block.module):
                gradients.append(_through(block, before.pop(), gradients[-1]))
        self.gradients = gradients[::-1]

    def before(self, index: int, hidden: Tensor) -> LayerEffects:
        """The effects of the layers of a block, which is in memory."""
        return _InBlock(self.blocks[index], hidden, self.gradients[index])


class _InBlock:
    def __init__(self, block: Block, hidden: Tensor, gradient: Tensor):
        self.tokens = hidden.shape[:2].numel()
        modules = {layer.name: layer.module for layer in block.linears}
        found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
        calls: list[tuple[str, Tensor, Tensor]] = []

        def note(name: str, x: Tensor, output: Tensor) -> None:
            calls.append((name, x.detach().flatten(0, -2), output))

        for window, of_window in zip(hidden.split(1), gradient.split(1), strict=True):
            with torch.enable_grad(), watch_outputs(modules, note):
                outputs = block.run(window.clone().requires_grad_())
            of_layers = torch.autograd.grad(outputs, [output for *_, output in calls], of_window, allow_unused=True)
            for (name, x, _), of_layer in zip(calls, of_layers, strict=True):
                if of_layer is not None:
                    found[name].append((x, of_layer.flatten(0, -2)))
            calls.clear()
        # the inputs [n, d_in] and the gradients [n, d_out]; an expert may have got no tokens
        self.layers = {name: tuple(map(torch.cat, zip(*pairs, strict=True))) for name, pairs in found.items() if pairs}

    def error(self, layer: LinearLayer, weight: Tensor, bias: Tensor | None) -> float:
        """The estimated divergence."""
        if layer.name not in self.layers:
            return 0.0
        x, gradient = self.layers[layer.name]
        change = x @ (weight - layer.module.weight).T.to(x)
        if bias is not None:
            change += bias - layer.module.bias
        return (gradient * change).sum(dim=1).double().square().sum().item() / (2 * self.tokens)

    def multiply_adds(self, layer: LinearLayer) -> float:
        """Those of the change of the layer's outputs."""
        return float(self.tokens * layer.module.weight.numel())


def _gradient_of_predictions(adapter: ModelAdapter, hidden: Tensor) -> Tensor:
    """The gradient of the log probability of drawn labels with respect to the hidden states [n, t, width] behind the blocks."""
    assert isinstance(adapter.inputs, TextInputs)
    generator = torch.Generator(hidden.device).manual_seed(0)
    gradient = torch.zeros_like(hidden)
    with torch.enable_grad():
        leaf = hidden.clone().requires_grad_()
        for logits in adapter.inputs.logits_of(adapter.model, leaf):
            log_p = logits.float().log_softmax(dim=-1)
            labels = log_p.detach().exp().multinomial(1, generator=generator)
            gradient += torch.autograd.grad(log_p.gather(1, labels).sum(), leaf)[0]
    return gradient


def _through(block: Block, hidden: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with respect to a block's inputs [n, t, width], from that with respect to its outputs."""
    found = []
    for window, of_window in zip(hidden.split(1), gradient.split(1), strict=True):
        with torch.enable_grad():
            leaf = window.clone().requires_grad_()
            found.append(torch.autograd.grad(block.run(leaf), leaf, of_window)[0])
    return torch.cat(found)
