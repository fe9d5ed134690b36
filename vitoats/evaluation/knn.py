"""k nearest neighbours on frozen features, a baseline without training."""

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07


def knn_predict(train: Tensor, labels: Tensor, test: Tensor, k: int = 20, chunk: int = 1024) -> Tensor:
    """The class that the k nearest training images vote for, as in DINOv2's k-NN evaluation.

    Neighbours are those with the largest cosine similarity s; each votes with weight exp(s / 0.07).

    Args:
        train: features [n, d].
        labels: [n].
        test: features [m, d].
        k: number of neighbours; all images if there are fewer.
        chunk: test images at a time.

    Returns:
        classes [m].
    """
    n_classes = int(labels.max()) + 1
    train = F.normalize(train, dim=1)
    chosen = []
    for part in test.split(chunk):
        similarity, nearest = (F.normalize(part, dim=1) @ train.T).topk(min(k, len(train)), dim=1)  # [m, k]
        votes = torch.zeros(len(part), n_classes)
        votes.scatter_add_(1, labels[nearest], (similarity / TEMPERATURE).exp())
        chosen.append(votes.argmax(dim=1))
    return torch.cat(chosen)
