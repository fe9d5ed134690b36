"""Training of a linear head on frozen features."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitoats.errors import InputError
from vitoats.models.heads import features


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    layers: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Tensor, Tensor]:
    """Features [n, (layers + 1) * d] and labels [n] of all images.

    Raises:
        InputError: there were none.
    """
    found, labels = [], []
    for images, batch_labels in batches:
        found.append(features(backbone, images, layers))
        labels.append(batch_labels)
        progress(sum(map(len, labels)))
    if not found:
        raise InputError("there was no image to compute features of: give --data-dir a folder with readable images")
    return torch.cat(found), torch.cat(labels)


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
        iterations: of L-BFGS at most.

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
