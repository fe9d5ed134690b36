"""Linear heads on frozen features, as in DINOv2's linear evaluation: many trained at once, the best picked on held-out images.

M. Oquab et al., arXiv 2304.07193, and dinov2/eval/linear.py: heads for 1 and 4 layers, with and without the mean of the patch
tokens, for 13 learning rates; SGD with momentum 0.9, no weight decay, cosine decay, batches of 128, 10 epochs, learning rates
scaled by batch / 256. Three things differ. Features are computed once from the evaluation crop, while theirs are computed anew
from random crops. The head is picked on held-out training images, while theirs is picked on the test images. The picked head is
trained again on all training images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitoats.common.errors import RunError
from vitoats.evaluation.features import Features

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
MOMENTUM = 0.9
DIVERGED = "training diverges (the loss is NaN or Inf): give smaller `learning_rates`"
FEWEST_STEPS = 1000  # a small set gets more epochs


@dataclass(frozen=True)
class Schedule:
    """How heads are trained by SGD.

    Attributes:
        learning_rates: one head for each; scaled by batch_size / 256.
        epochs: passes over the images; more if these are fewer than ``FEWEST_STEPS`` steps.
        batch_size: images per step.
        seed: seed of the initial weights and the order of the images.
    """

    learning_rates: tuple[float, ...] = LEARNING_RATES
    epochs: int = 10
    batch_size: int = 128
    seed: int = 0

    def steps(self, n: int) -> int:
        """Number of steps on n images."""
        return max(FEWEST_STEPS, self.epochs * math.ceil(n / self.batch_size))


@dataclass(frozen=True)
class Candidate:
    """A head that could be picked: its setting, and its results on held-out images.

    Attributes:
        layers: how many class tokens it takes.
        patch_mean: whether it takes the mean of the patch tokens.
        learning_rate: before scaling; None for logistic regression.
        top1: accuracy on the held-out images, in percent.
        loss: cross-entropy on them, which breaks ties.
    """

    layers: int
    patch_mean: bool
    learning_rate: float | None
    top1: float
    loss: float


def train_heads(
    x: Tensor, y: Tensor, n_classes: int, schedule: Schedule, progress: Callable[[int, int], None] = lambda *_: None
) -> tuple[Tensor, Tensor]:
    """Trains one head for each learning rate, all on the same batches.

    The gradient of the mean cross-entropy is (softmax(x Wᵀ + b) - onehot(y))ᵀ x / batch for each head.

    Args:
        x: features [n, d].
        y: labels [n].
        n_classes: C.
        schedule: learning rates [h] and the rest.
        progress: called with the steps done and the total number of steps.

    Returns:
        weight [h, C, d] and bias [h, C].
    """
    h, d, batch = len(schedule.learning_rates), x.shape[1], schedule.batch_size
    generator = torch.Generator().manual_seed(schedule.seed)
    # the bias is one more column, for a feature that is always 1
    W = torch.cat([0.01 * torch.randn(h * n_classes, d, generator=generator), torch.zeros(h * n_classes, 1)], dim=1)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    rates = torch.tensor(schedule.learning_rates).repeat_interleave(n_classes)[:, None] * batch / 256
    momentum = torch.zeros_like(W)
    steps = schedule.steps(len(x))
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(x), generator=generator)])
        index, order = order[:batch], order[batch:]
        error = (x[index] @ W.T).reshape(batch, h, n_classes).softmax(dim=2)  # [b, h, C]
        error[torch.arange(batch), :, y[index]] -= 1
        momentum.mul_(MOMENTUM).addmm_(error.reshape(batch, -1).T, x[index], alpha=1 / batch)
        W -= rates * (0.5 * (1 + math.cos(math.pi * step / steps))) * momentum
        if step % 100 == 99 or step == steps - 1:
            progress(step + 1, steps)
    W = W.reshape(h, n_classes, d + 1)
    return W[:, :, :d].contiguous(), W[:, :, d].contiguous()


def train(
    features: Features,
    n_classes: int,
    layers: int,
    patch_mean: bool,
    schedule: Schedule | None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[Tensor, Tensor]:
    """Trains on one choice of features: a head for each learning rate, or one logistic regression if there is no schedule.

    Returns:
        weight [h, C, (layers + patch_mean) * d] and bias [h, C].
    """
    x, y = features.select(layers, patch_mean), features.labels
    if schedule is not None:
        return train_heads(x, y, n_classes, schedule, progress)
    weight, bias = train_linear_head(x, y, n_classes)
    return weight[None], bias[None]


def try_heads(
    features: Features,
    held_out: Features,
    n_classes: int,
    layers: Sequence[int],
    schedule: Schedule | None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Candidate]:
    """Trains all heads on ``features`` and scores them on ``held_out``."""
    rates: Sequence[float | None] = (None,) if schedule is None else schedule.learning_rates
    found = []
    for n_layers in layers:
        for patch_mean in (False, True) if n_layers else (True,):
            weight, bias = train(features, n_classes, n_layers, patch_mean, schedule, progress)
            x = held_out.select(n_layers, patch_mean)
            for rate, w, b in zip(rates, weight, bias, strict=True):
                logits = x @ w.T + b
                loss = F.cross_entropy(logits, held_out.labels).item()
                found.append(Candidate(n_layers, patch_mean, rate, accuracy(logits, held_out.labels), loss))
    return found


def train_again(picked: Candidate, features: Features, n_classes: int, schedule: Schedule | None) -> tuple[Tensor, Tensor]:
    """Trains the picked head on other images: weight [C, (layers + patch_mean) * d] and bias [C].

    Raises:
        RunError: the head diverges, as did all others if it was picked with a loss that is not finite.
    """
    if not math.isfinite(picked.loss):
        raise RunError(DIVERGED)
    if schedule is not None and picked.learning_rate is not None:
        schedule = replace(schedule, learning_rates=(picked.learning_rate,))
    weight, bias = train(features, n_classes, picked.layers, picked.patch_mean, schedule)
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise RunError(DIVERGED)
    return weight[0], bias[0]


def pick(candidates: list[Candidate]) -> Candidate:
    """The best head on held-out images; ties go to the smallest loss, and a head that diverged is the last choice."""
    return max(candidates, key=lambda c: (math.isfinite(c.loss), c.top1, -c.loss))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    return 100 * int((logits.argmax(dim=1) == labels).sum()) / len(labels)


def train_linear_head(
    x: Tensor, y: Tensor, n_classes: int, weight_decay: float = 3e-3, iterations: int = 150
) -> tuple[Tensor, Tensor]:
    """Logistic regression by L-BFGS on standardised features, folded back to raw ones.

    Minimises mean cross-entropy + weight_decay * ||W||^2, W on features of mean 0 and variance 1.

    Args:
        x: features [n, d].
        y: labels [n].
        n_classes: outputs.
        weight_decay: weight of the penalty.
        iterations: maximum number of L-BFGS iterations.

    Returns:
        weight [n_classes, d] and bias [n_classes] for raw features.
    """
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    z = (x - mean) / std
    weight = torch.zeros(n_classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(n_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(z @ weight.T + bias, y) + weight_decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        raw = weight / std
        return raw, bias - raw @ mean
