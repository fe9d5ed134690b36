"""Freed memory is reused while a run works, and handed back between its blocks."""

import subprocess
import sys

import pytest
import torch

from vitoats.common.memory import PageBuffers

SCRIPT = """
import resource
import torch
from vitoats.common.memory import PageBuffers, return_freed_memory, reuse_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    before = faults()
    for _ in range(10):
        torch.zeros(2**24)  # 64 MiB
    return faults() - before

fresh = work()
reuse_freed_memory()
work()
reused = work()
held = resident()
return_freed_memory()
returned = held - resident()
before = resident()
kept = PageBuffers(1, torch.device("cpu")).copy("x", torch.ones(2**24))
return_freed_memory()
with_kept = resident() - before
del kept
print(fresh, reused, returned, with_kept, with_kept - (resident() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is what is tuned")
def test_freed_tensors_are_reused_until_they_are_handed_back():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    fresh, reused, returned, apart, gone = map(int, done.stdout.split())
    assert reused < fresh / 20
    assert returned > 2**25
    assert 2**25 < gone <= apart < 2**27  # of 2**26 bytes, although freed memory is held on to


@pytest.mark.parametrize("x", [torch.randn(3, 4).T, torch.ones(2, 0, 5), torch.arange(6, dtype=torch.int64), torch.tensor(1.5)])
def test_what_is_copied_to_pages_is_a_copy(x):
    copy = PageBuffers(1, torch.device("cpu")).copy("x", x)
    assert torch.equal(copy, x)
    assert copy.dtype == x.dtype
    if x.numel():
        copy.zero_()
        assert x.any()


def test_copies_under_one_name_are_apart_from_each_other_whatever_their_shapes():
    buffers = PageBuffers(2, torch.device("cpu"))
    tensors = [torch.full((4, 3), 1.0), torch.full((2, 3), 2.0), torch.full((4, 3), 3.0)]  # a smaller one, and one too many
    copies = [buffers.copy("x", x) for x in tensors]
    for copy, x in zip(copies, tensors, strict=True):
        assert torch.equal(copy, x)
