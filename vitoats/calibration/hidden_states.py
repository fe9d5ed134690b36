"""The hidden states of the calibration images between two blocks.

They are one tensor [n, tokens, width], updated in place, so memory does not grow with depth (vitoats.compression.estimates).
A block runs over them while still dense, to measure its layers' inputs, and again once compressed, to advance them. Several
processes (``common.ranks``) deal out the images in turn.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from vitoats.common import ranks
from vitoats.common.errors import InputError, RunError
from vitoats.common.memory import release_mapped_pages
from vitoats.models.blocks import Block, ModelAdapter
from vitoats.models.on_disk import held

CPU = torch.device("cpu")


class HiddenStates:
    """The hidden states of this process's calibration images before the current block, [n, *its hidden shape], float32.

    Attributes:
        n_images: the number of images of all processes.
        amp: whether blocks run under autocast to bfloat16.
    """

    def __init__(self, values: Tensor, batch_size: int, device: torch.device, spill_to: Path | None, amp: bool = False):
        self.values = values
        self.batch_size = batch_size
        self.device = device
        self.spill_to = spill_to
        self.amp = amp
        self.n_images = ranks.total(len(values))

    @classmethod
    def collect(
        cls,
        adapter: ModelAdapter,
        images: Iterator[Tensor],
        nsamples: int,
        batch_size: int,
        spill_to: Path | None = None,
        storage: torch.device = CPU,
        amp: bool = False,
    ) -> "HiddenStates":
        """Runs the images up to the first block.

        Args:
            adapter: the model.
            images: batches [b, 3, h, w], at most ``nsamples`` images in total.
            nsamples: maximum number of images.
            batch_size: how many images a block runs on at a time.
            spill_to: folder for a memory-mapped file of hidden states; None keeps them in memory.
            storage: the device whose memory that is.
            amp: run the blocks under autocast to bfloat16; what comes before them runs in float32.

        Raises:
            InputError: there are fewer images than processes.
            RunError: there is no room for the hidden states.
        """
        values = _allocate((ranks.share(nsamples), *adapter.blocks[0].shape_before), storage, spill_to)
        read = count = 0
        with held(adapter.blocks[0].module):
            for batch in images:
                own = batch[(ranks.rank() - read) % ranks.size() :: ranks.size()]
                read += len(batch)
                if len(own):
                    values[count : count + len(own)] = adapter.first_hidden(own.to(adapter.device))
                    _release(values, spill_to)
                    count += len(own)
        if read < ranks.size():
            raise InputError(f"{ranks.size()} processes cannot share {read} images: raise `nsamples`, or start fewer")
        return cls(values[:count], batch_size, adapter.device, spill_to, amp)

    def copy(self, spill_to: Path | None = None) -> "HiddenStates":
        """A copy, in memory or in a file in ``spill_to``."""
        values = _allocate(tuple(self.values.shape), self.values.device, spill_to)
        for mine, copied in zip(self.values.split(self.batch_size), values.split(self.batch_size), strict=True):
            copied.copy_(mine)
            _release(mine, self.spill_to)
            _release(copied, spill_to)
        return HiddenStates(values, self.batch_size, self.device, spill_to, self.amp)

    def of_images(self, step: int = 1, count: int | None = None) -> Tensor:
        """The hidden states of every ``step``-th image, at most ``count``, on the device of every process."""
        chosen = range(0, self.n_images, step)[:count]
        if ranks.size() == 1:
            return self.values[::step][:count].to(self.device)
        found = self.values.new_zeros(len(chosen), *self.values.shape[1:])
        for i, image in enumerate(chosen):
            if image % ranks.size() == ranks.rank():
                found[i] = self.values[image // ranks.size()]
        ranks.add_up([found])
        return found.to(self.device)

    def thinned(self, x: Tensor, batch: int, stride: int) -> Tensor:
        """Every ``stride``-th token of x [b * tokens, k] from this batch; the first one differs from batch to batch.

        They are the same tokens however many processes share the images, if tokens follow each other image by image.
        """
        first = batch * self.batch_size
        images = len(self.values[first : first + self.batch_size])
        if ranks.size() == 1 or len(x) % images:
            return x[batch % stride :: stride]
        image = ranks.rank() + ranks.size() * torch.arange(first, first + images, device=x.device)  # its number in all
        inside = torch.arange(len(x) // images, device=x.device)
        place = image[:, None] % self.batch_size * len(inside) + inside
        return x[(place % stride == image[:, None] // self.batch_size % stride).flatten()]

    @property
    def n_batches(self) -> int:
        return -(-len(self.values) // self.batch_size)

    @property
    def n_batches_in_all(self) -> int:
        """Number of batches in which one process would see the images of all."""
        return -(-self.n_images // self.batch_size)

    def batch(self, i: int) -> Tensor:
        """The hidden states of one batch, on the device; if a file holds them, those of others leave the memory."""
        _release(self.values, self.spill_to)
        return self.values[i * self.batch_size : (i + 1) * self.batch_size].to(self.device)

    def batches(self) -> Iterator[Tensor]:
        """The hidden states of all images, batch by batch, on the device."""
        return (self.batch(i) for i in range(self.n_batches))

    def run(self, block: Block, hidden: Tensor, module: nn.Module | None = None) -> Tensor:
        """Runs a block, or another module instead of it, on some hidden states on the device (``Block.run``)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return block.run(hidden, module)

    @torch.inference_mode()
    def advance(self, block: Block, run: Callable[[int, Tensor], Tensor] | None = None) -> None:
        """Replaces the hidden states by a block's outputs, in place or, if their shape differs, in a new tensor.

        Args:
            block: the block in its current state.
            run: maps a batch's index and hidden states to the block's outputs; ``self.run`` by default.
        """
        run = run or (lambda _i, batch: self.run(block, batch))
        before = self.values
        if before.shape[1:] != block.shape_after:
            self.values = _allocate((len(before), *block.shape_after), before.device, self.spill_to)
        batches = zip(before.split(self.batch_size), self.values.split(self.batch_size), strict=True)
        for i, (batch, outputs) in enumerate(batches):
            outputs.copy_(run(i, batch.to(self.device)))
            _release(batch, self.spill_to)
            _release(outputs, self.spill_to)


def _release(values: Tensor, spill_to: Path | None) -> None:
    """Takes hidden states that are in a file in ``spill_to`` out of resident memory."""
    if spill_to is not None:
        release_mapped_pages(values)


def _allocate(shape: tuple[int, ...], storage: torch.device, spill_to: Path | None) -> Tensor:
    """An uninitialised float32 tensor, in the memory of a device or in an unnamed file that disappears with it."""
    if spill_to is None:
        try:
            return torch.empty(shape, dtype=torch.float32, device=storage)
        except RuntimeError:
            raise RunError(
                f"no memory for hidden states of shape {list(shape)}: lower `nsamples`, or set `memory_limit`"
            ) from None
    size = 4 * math.prod(shape)
    with tempfile.TemporaryFile(dir=spill_to) as file:  # unnamed: it disappears however the process ends
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here; later it would be a signal
        except OSError as error:
            raise RunError(
                f"no room for {size / 1e9:.2f} GB of hidden states in {spill_to} ({error.strerror}): "
                f"free some space, or lower `nsamples`"
            ) from None
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.float32).view(shape)
