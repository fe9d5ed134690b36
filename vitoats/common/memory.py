"""What becomes of freed memory, where the C library is glibc. Other libraries have no such calls and are left alone.

glibc hands large freed tensors back to the system at once and gets them anew, zeroed page by page: a fifth of the time of a
ViT-B's compression. Reused, memory stays with the process. What is to be kept for long is copied out of it, or it would leave
holes of every size behind.
"""

import ctypes
import mmap
import sys

import torch
from torch import Tensor

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of malloc.h
LARGEST_REUSED = 2**30  # bytes


def reuse_freed_memory() -> None:
    """Lets the process hold on to what it frees, from now on, until it asks for it or ``return_freed_memory`` is called."""
    libc = _glibc()
    if libc:
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_REUSED)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never by itself


def return_freed_memory() -> None:
    """Hands free pages back to the system: what is kept for long between them would otherwise let the process grow."""
    libc = _glibc()
    if libc:
        libc.malloc_trim(0)


class PageBuffers:
    """Copies on the CPU in pages of their own, which go back to the system when a copy is freed.

    The first copy under a name makes room for all, which takes no memory until it is written to. Where each copy makes its own,
    its few hundred bytes on the heap lie between the large tensors of one batch, and those of the next no longer fit there: the
    heap of a ViT-B's compression grows by 0.7 GB.
    """

    def __init__(self, count: int):
        """``count``: how many copies of equal shape there will be under a name; others get room when they come."""
        self._count = count
        self._room: dict[str, list[Tensor]] = {}

    def copy(self, name: str, x: Tensor) -> Tensor:
        """A copy of x.

        Raises:
            MemoryError: there is no room.
        """
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
