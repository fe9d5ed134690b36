"""Several processes that ``torchrun`` started share one run through torch.distributed: gloo on CPUs, nccl on GPUs.

Without torchrun there is one process, and every function here returns what it was given. All processes must make the same calls
in the same order. They exchange tensors and JSON, no pickles.

Memory and traffic: docs/several-processes.md.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from vitoats.common.errors import RunError, SilentError

PATIENCE = timedelta(hours=1)  # how long a process waits for a slower one; the end of another is noticed at once
WORTH_SHARING = 2**25  # multiply-adds of a product, from which on sharing its rows is worth the traffic
VALUES = "values"  # the tensor that holds JSON in a packet

T = TypeVar("T")
_alone = False  # whether this process is at work on a task of its own


def started() -> bool:
    """Whether torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextmanager
def joined(device: str = "cpu") -> Iterator[None]:
    """In this context, the processes that torchrun started work together; ``device`` "cuda" gives each a GPU of its node.

    The first error ends the run. Only the process that has it reports it.

    Raises:
        SilentError: another process reports the error.
        RunError: another process has ended without a report.
    """
    if not started() or dist.is_initialized():
        yield
        return
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        yield
        _try(dist.barrier)
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun stops all processes when one has ended; say why first
        if not _is_first_to_fail(store):
            raise SilentError from None
        if isinstance(error, KeyboardInterrupt):
            raise RunError("interrupted, or another process of this run was killed: add `resume` to go on") from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # without it, gloo's threads may outlive what they use, and the process aborts


def _is_first_to_fail(store: dist.Store) -> bool:
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # the store ended, too
        return rank() == 0


def _try(collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        collective(*args, **kwargs)
    except RuntimeError as error:
        text = str(error).splitlines()[0].rsplit("] ", 1)[-1][:100]
        raise RunError(
            f"another process of this run has ended or cannot be reached ({text}): see what it said, then add `resume` to go on"
        ) from None


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes files and messages."""
    return rank() == 0


def on_this_machine() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def share(n: int) -> int:
    """The most of n equal things that one process gets."""
    return -(-n // size())


def wait_for_all() -> None:
    """Waits until all processes are here."""
    if size() > 1:
        _try(dist.barrier)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its sum over all processes."""
    if size() > 1:
        for tensor in tensors:
            _try(dist.all_reduce, tensor)


def total(number: int) -> int:
    """The sum of a number over all processes."""
    if size() == 1:
        return number
    found = torch.tensor(number)
    add_up([found])
    return int(found)


def maximum(x: Tensor) -> Tensor:
    """The largest of x over all processes, entry by entry."""
    if size() == 1:
        return x
    x = x.clone()
    _try(dist.all_reduce, x, op=dist.ReduceOp.MAX)
    return x


def of_first(x: Tensor) -> Tensor:
    """The first process's x, of the same shape and type everywhere."""
    if size() == 1:
        return x
    x = x.clone()
    _try(dist.broadcast, x, 0)
    return x


def from_first(make: Callable[[], Any]) -> Any:
    """The plain values, for JSON, that the first process makes; the others wait."""
    if size() == 1:
        return make()
    return _send({}, make() if is_first() else None, 0)[1]


def shared_out(
    tasks: Sequence[T],
    costs: Sequence[float],
    work: Callable[[T], Any],
    pack: Callable[[Any], tuple[dict[str, Tensor], Any]],
    unpack: Callable[[dict[str, Tensor], Any], Any],
) -> Iterator[Any]:
    """Yields the result of each task in order, each made by one process.

    Args:
        tasks: independent of each other.
        costs: their estimated costs, in any unit.
        work: makes a task's result.
        pack: turns a result into tensors and plain values, for JSON.
        unpack: the reverse, on every process.
    """
    if size() == 1 or len(tasks) == 1:  # a single task is shared row by row
        yield from map(work, tasks)
        return
    owners = longest_first(costs, size())
    global _alone
    _alone = True
    try:
        own = {i: pack(work(task)) for i, task in enumerate(tasks) if owners[i] == rank()}
    finally:
        _alone = False
    for i, owner in enumerate(owners):
        yield unpack(*_send(*own.pop(i, ({}, None)), owner))


def longest_first(costs: Sequence[float], n: int) -> list[int]:
    """Who of n workers gets each task: the longest tasks first, each to the one with the least work."""
    loads, owners = [0.0] * n, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


def row_by_row(f: Callable[..., Tensor], *matrices: Tensor, work: float) -> Tensor:
    """f(*matrices) for an f that treats every row alike: each process computes some rows, and all get all.

    Args:
        f: matrices of equal height to one of this height.
        matrices: [n, ...].
        work: its multiply-adds; a small f is not shared.
    """
    if size() == 1 or _alone or work < WORTH_SHARING:
        return f(*matrices)
    n, height = len(matrices[0]), share(len(matrices[0]))
    own = f(*(x[rank() * height : (rank() + 1) * height] for x in matrices))
    padded = own.new_zeros(height, *own.shape[1:])
    padded[: len(own)] = own
    found = own.new_empty(height * size(), *own.shape[1:])
    _try(dist.all_gather_into_tensor, found, padded)
    return found[:n]


def _send(tensors: dict[str, Tensor], values: Any, owner: int) -> tuple[dict[str, Tensor], Any]:
    """The owner's tensors and plain values, on the CPU of every process."""
    packet, length = torch.empty(0, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    if rank() == owner:
        text = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()} | {VALUES: text}
        packet = torch.frombuffer(bytearray(safetensors.torch.save(content)), dtype=torch.uint8)
        length[0] = len(packet)
    _try(dist.broadcast, length, owner)
    if rank() != owner:
        packet = torch.empty(int(length), dtype=torch.uint8)
    _try(dist.broadcast, packet, owner)
    found = safetensors.torch.load(packet.numpy().tobytes())
    return found, json.loads(found.pop(VALUES).numpy().tobytes())
