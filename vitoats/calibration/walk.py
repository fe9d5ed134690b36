"""From block to block with the calibration images."""

from collections.abc import Iterator
from typing import Protocol

from vitoats.models.blocks import Block


class BetweenBlocks(Protocol):
    """Calibration images between two blocks: hidden states, or what is made of them."""

    def advance(self, block: Block, /) -> None:
        """Moves on from before a block to behind it."""


def walk(blocks: list[Block], images: BetweenBlocks) -> Iterator[Block]:
    """Yields block after block, with the images before it; then they move on through what the caller has made of the block.

    Behind the last block nobody needs them.
    """
    for block in blocks:
        yield block
        if block is not blocks[-1]:
            images.advance(block)
