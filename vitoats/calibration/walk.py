"""Takes the calibration images from block to block."""

from collections.abc import Iterator
from typing import Protocol

from vitoats.models.blocks import Block
from vitoats.models.on_disk import held


class BetweenBlocks(Protocol):
    """Calibration images between two blocks: their hidden states, or an object built on them."""

    def advance(self, block: Block, /) -> None:
        """Advances from before a block to behind it."""


def walk(blocks: list[Block], images: BetweenBlocks) -> Iterator[Block]:
    """Yields each block with the images before it, then advances them through the block as the caller has left it.

    The last block is not run: its outputs are not needed. A block on disk is in memory meanwhile.
    """
    for block in blocks:
        with held(block.module):
            yield block
            if block is not blocks[-1]:
                images.advance(block)
