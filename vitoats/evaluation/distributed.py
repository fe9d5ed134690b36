"""One evaluation shared by several CPU processes that ``torchrun`` started.

Whole batches are dealt out in turn. They are the same batches that a single process would see, so the counts are exactly the
same, too. Nothing is padded and nothing is dropped. The processes exchange only three counts, once, through torchrun's
rendezvous store. A gloo process group would work as well, but with one, processes sometimes aborted on exit, and collectives
time out after half an hour.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from torch.distributed import Store
from torch.distributed.rendezvous import rendezvous

from vitoats.evaluation.accuracy import Accuracy

PATIENCE = timedelta(days=7)  # how long the fastest process waits for the slowest; torchrun stops them all when one fails


@dataclass(frozen=True)
class World:
    """This process's ``rank`` among ``size`` processes, and the store that they share."""

    rank: int = 0
    size: int = 1
    store: Store | None = None

    def share(self, order: list[int], batch_size: int) -> list[list[int]]:
        """This process's batches of a run over ``order``."""
        whole = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        return whole[self.rank :: self.size]

    def total(self, own: Accuracy) -> Accuracy:
        """The counts of all processes together; ``seconds`` is that of the slowest, predictions stay this process's own."""
        if self.store is None:
            return own
        self.store.set(f"counts/{self.rank}", json.dumps(asdict(replace(own, hits1=[], hits5=[], predictions=[]))))
        everyone = [Accuracy(**json.loads(self.store.get(f"counts/{rank}"))) for rank in range(self.size)]  # get waits
        return replace(
            own,
            n_images=sum(one.n_images for one in everyone),
            correct1=sum(one.correct1 for one in everyone),
            correct5=sum(one.correct5 for one in everyone),
            seconds=max(one.seconds for one in everyone),
        )

    def leave(self) -> None:
        """Leaves the process group. The first process, which may host the store, leaves last."""
        if self.store is None:
            return
        self.store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            self.store.wait([f"left/{rank}" for rank in range(self.size)])


def join() -> World:
    """Joins the other processes that torchrun started, if any."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return World()
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    return World(rank, size, store)
