"""Modules whose parameters are read when they run."""

import copy

import pytest
import torch
from torch import nn

from vitoats.models.on_disk import OnDisk, held, largest_on_disk, on_disk, parameters_on_meta, size_in_memory


class Reads:
    """A module on disk, and how often it was read."""

    def __init__(self):
        self.module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval().requires_grad_(False)
        self.expected = copy.deepcopy(self.module)
        self.times = 0
        OnDisk(self.module, self.read)

    def read(self):
        self.times += 1
        return {name: parameter.clone() for name, parameter in self.expected.named_parameters()}

    @property
    def in_memory(self):
        return not any(parameter.is_meta for parameter in self.module.parameters())


def test_a_call_reads_the_parameters_and_drops_them():
    reads, x = Reads(), torch.ones(2, 3)
    assert not reads.in_memory
    assert torch.equal(reads.module(x), reads.expected(x))
    assert (reads.times, reads.in_memory) == (1, False)


def test_a_held_module_is_read_once():
    reads, x = Reads(), torch.ones(2, 3)
    with held(reads.module), held(reads.module):
        assert reads.in_memory
        reads.module(x)
    assert (reads.times, reads.in_memory) == (1, False)
    with held(nn.Linear(2, 2)), held(None):  # in memory anyway
        pass


def test_an_error_drops_the_parameters_too():
    reads = Reads()
    with pytest.raises(RuntimeError, match="shapes"):
        reads.module(torch.ones(2, 5))
    assert not reads.in_memory
    reads.module(torch.ones(2, 3))
    assert not reads.in_memory


def test_a_replaced_forward_reads_nothing():
    reads = Reads()
    reads.module.forward = lambda x: x
    assert reads.module(5) == 5
    assert reads.times == 0


def test_a_copy_of_a_held_module_stays_in_memory():
    reads, x = Reads(), torch.ones(2, 3)
    with held(reads.module):
        copied = copy.deepcopy(reads.module)
        assert torch.equal(copied(x), reads.expected(x))
    assert torch.equal(copied(x), reads.expected(x))
    assert not reads.in_memory


def test_a_module_that_stays_is_an_ordinary_one():
    reads, x = Reads(), torch.ones(2, 3)
    on_disk(reads.module).stay()
    assert reads.in_memory
    assert on_disk(reads.module) is None
    assert torch.equal(reads.module(x), reads.expected(x))
    assert reads.in_memory


def test_sizes():
    model = nn.Sequential(nn.Linear(3, 5), Reads().module)
    assert size_in_memory(model) == 4 * 20
    assert largest_on_disk(model) == 4 * (16 + 8)
    assert largest_on_disk(nn.Linear(2, 2)) == 0


def test_new_modules_have_their_buffers_but_no_parameters():
    with parameters_on_meta():
        made = nn.BatchNorm1d(4)
    assert made.weight.is_meta
    assert torch.equal(made.running_var, torch.ones(4))
    assert not nn.Linear(2, 2).weight.is_meta
