"""Freed memory is reused while a run works, and handed back between its blocks."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from vitoats.memory import return_freed_memory, reuse_freed_memory

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
print(fresh, reused, held - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is what is tuned")
def test_freed_tensors_are_reused_until_they_are_handed_back():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    fresh, reused, returned = map(int, done.stdout.split())
    assert reused < fresh / 20
    assert returned > 2**25
