"""Controls how glibc handles freed memory. Other C libraries lack these calls, and nothing is done there.

glibc returns large freed tensors to the system at once and requests new memory for the next ones, zeroed page by page. This
takes a fifth of the time of a ViT-B's compression. If memory is reused instead, it stays with the process. Long-lived tensors
must then be copied elsewhere, or they fragment the heap.
"""

import ctypes
import mmap
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # from malloc.h
LARGEST_REUSED = 2**30  # bytes
SMALLEST_RETURNED = 2**20


def reuse_freed_memory() -> None:
    """From now on the process keeps freed memory for reuse, until ``return_freed_memory`` is called."""
    libc = _glibc()
    if libc:
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_REUSED)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never trim automatically


def never_keep_freed_memory() -> None:
    """From now on each large tensor that is freed returns to the system, which costs time and leaves no gaps."""
    libc = _glibc()
    if libc:
        libc.mallopt(M_MMAP_THRESHOLD, SMALLEST_RETURNED)


def return_freed_memory() -> None:
    """Returns free pages to the system; long-lived tensors between them would otherwise make the process grow."""
    libc = _glibc()
    if libc:
        libc.malloc_trim(0)


def resident_memory() -> int | None:
    """The bytes that this process has resident now, once free pages are returned; None where the system does not say."""
    return_freed_memory()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return None


def peak_memory() -> int:
    """The most bytes that this process has had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_mapped_pages(x: Tensor) -> None:
    """Takes the pages of a tensor that a file backs (mapped shared) out of resident memory; they are read again when used."""
    if sys.platform == "linux" and x.numel():
        first = x.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = x.data_ptr() + x.numel() * x.element_size() - first
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


class PageBuffers:
    """Copies of tensors; on the CPU each has its own mapped pages, which return to the system when the copy is freed.

    The first copy under a name allocates buffers for all copies; they take no memory until they are written to. If each copy
    allocated its own, its few hundred bytes on the heap would lie between the large tensors of one batch, and those of the next
    batch would no longer fit there: the heap of a ViT-B's compression grows by 0.7 GB.
    """

    def __init__(self, count: int, storage: torch.device):
        """``count`` is the expected number of copies of equal shape per name; further copies are allocated on demand.

        The copies are in the memory of the device ``storage``.
        """
        self._count, self._storage = count, storage
        self._room: dict[str, list[Tensor]] = {}

    def copy(self, name: str, x: Tensor) -> Tensor:
        """Copies x.

        Raises:
            MemoryError: the pages cannot be allocated.
        """
        if self._storage.type != "cpu":
            return x.to(self._storage, copy=True)
        if name not in self._room:
            self._room[name] = [_in_pages(x) for _ in range(self._count)]
        room = self._room[name].pop() if self._room[name] else _in_pages(x)
        return (room if room.shape == x.shape else _in_pages(x)).copy_(x)


def _in_pages(like: Tensor) -> Tensor:
    try:
        pages = mmap.mmap(-1, max(1, like.numel()) * like.element_size())
    except OSError:
        raise MemoryError from None
    return torch.frombuffer(pages, dtype=like.dtype)[: like.numel()].view(like.shape)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
