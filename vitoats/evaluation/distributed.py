"""One evaluation shared by several processes that ``torchrun`` started (``common.ranks``).

Whole batches are dealt out in turn. They are the same batches that a single process would see, so the counts are exactly the
same, too. Nothing is padded and nothing is dropped.
"""

from dataclasses import replace

import torch

from vitoats.common import ranks
from vitoats.evaluation.accuracy import Accuracy


def share(order: list[int], batch_size: int) -> list[list[int]]:
    """This process's batches of a run over ``order``."""
    whole = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return whole[ranks.rank() :: ranks.size()]


def total(own: Accuracy) -> Accuracy:
    """The counts of all processes together; ``seconds`` is that of the slowest, predictions stay this process's own."""
    return replace(
        own,
        n_images=ranks.total(own.n_images),
        correct1=ranks.total(own.correct1),
        correct5=ranks.total(own.correct5),
        seconds=ranks.maximum(torch.tensor(own.seconds, dtype=torch.float64)).item(),
    )
