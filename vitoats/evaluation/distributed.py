"""One evaluation on several processes that ``torchrun`` started, on the CPU.

Whole batches are dealt out in turn, the very batches that one process would see, so every image meets the model in the same
company and the counts are those of one process to the last digit. Nothing is padded and nothing is dropped. All that the
processes have to tell each other is three counts, once: they go through the store in which torchrun lets them meet. A gloo
process group would do as well, but with one a process sometimes aborted at its end, and collectives wait half an hour only.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from torch.distributed import Store
from torch.distributed.rendezvous import rendezvous

from vitoats.evaluation.accuracy import Accuracy

PATIENCE = timedelta(days=7)  # of the fastest process with the slowest; torchrun ends them all when one fails


@dataclass(frozen=True)
class World:
    """This process among all: number ``rank`` of ``size``, and the store where they meet."""

    rank: int = 0
    size: int = 1
    store: Store | None = None

    def share(self, order: list[int], batch_size: int) -> list[list[int]]:
        """This process's batches of a run over ``order``."""
        whole = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        return whole[self.rank :: self.size]

    def total(self, own: Accuracy) -> Accuracy:
        """The counts of all processes together; ``seconds`` are those of the slowest, predictions stay this process's own."""
        if self.store is None:
            return own
        self.store.set(f"counts/{self.rank}", json.dumps(asdict(replace(own, hits1=[], hits5=[], predictions=[]))))
        everyone = [Accuracy(**json.loads(self.store.get(f"counts/{rank}"))) for rank in range(self.size)]  # get waits for it
        return replace(
            own,
            n_images=sum(one.n_images for one in everyone),
            correct1=sum(one.correct1 for one in everyone),
            correct5=sum(one.correct5 for one in everyone),
            seconds=max(one.seconds for one in everyone),
        )

    def leave(self) -> None:
        """Parts from the others. The first process, which may keep the store, goes last."""
        if self.store is None:
            return
        self.store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            self.store.wait([f"left/{rank}" for rank in range(self.size)])


def join() -> World:
    """Meets the other processes that torchrun started; alone where it did not."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return World()
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    return World(rank, size, store)
