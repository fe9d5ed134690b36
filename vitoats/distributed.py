"""One evaluation on several processes that ``torchrun`` started, over gloo on the CPU.

Whole batches are dealt out in turn, the very batches that one process would see, so every image meets the model in the same
company and the counts are those of one process to the last digit. Nothing is padded and nothing is dropped.
"""

import os
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from vitoats.evaluate.accuracy import Accuracy


@dataclass(frozen=True)
class World:
    """This process among all: number ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    def share(self, order: list[int], batch_size: int) -> list[list[int]]:
        """This process's batches of a run over ``order``."""
        whole = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        return whole[self.rank :: self.size]

    def total(self, own: Accuracy) -> Accuracy:
        """The counts of all processes together; ``seconds`` are those of the slowest, predictions stay this process's own."""
        if self.size == 1:
            return own
        counts = torch.tensor([own.n_images, own.correct1, own.correct5])
        dist.all_reduce(counts)
        seconds = torch.tensor(own.seconds, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        n_images, correct1, correct5 = counts.tolist()
        return replace(own, n_images=n_images, correct1=correct1, correct5=correct5, seconds=seconds.item())


def join() -> World:
    """Meets the other processes that torchrun started; alone where it did not."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    return World(dist.get_rank(), size) if size > 1 else World()


def leave() -> None:
    """Parts from the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
