"""The KV blocks of one engine as vLLM's block pool keeps them: shared by prefix, the longest unused are given away first."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence


class KvBlocks:
    """Blocks with reference counts, a prefix cache, and a queue of free blocks.

    A block that nobody uses stays in the prefix cache until it is handed out again. Freed blocks with contents go to the end of
    the free queue, the last block of a sequence first; freed blocks without contents go to its front (`block_pool.py` of vLLM).

    Args:
        blocks: that can be handed out; vLLM keeps one more for itself.
        tokens: per block.
    """

    def __init__(self, blocks: int, tokens: int) -> None:
        self.tokens = tokens
        self.capacity = blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._users = [0] * blocks
        self._keys: list[Hashable | None] = [None] * blocks
        self._cached: dict[Hashable, int] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody uses, cached or not."""
        return len(self._free)

    def hits(self, keys: Sequence[Hashable]) -> int:
        """How many blocks at the beginning of such a sequence are cached."""
        cached = self._cached
        for index, key in enumerate(keys):
            if key not in cached:
                return index
        return len(keys)

    def needed(self, keys: Sequence[Hashable], hits: int, tokens: int) -> int:
        """Free blocks it takes to hold `tokens` of a sequence of which the first `hits` blocks are cached."""
        unused = sum(not self._users[self._cached[key]] for key in keys[:hits])
        return -(-tokens // self.tokens) - hits + unused

    def touch(self, keys: Sequence[Hashable]) -> list[int]:
        """The cached blocks of these keys, each with one more user."""
        taken = [self._cached[key] for key in keys]
        for block in taken:
            if not self._users[block]:
                del self._free[block]
            self._users[block] += 1
        return taken

    def allocate(self, count: int) -> list[int]:
        """So many blocks from the front of the free queue; what they held is lost. There must be as many."""
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            key = self._keys[block]
            if key is not None:
                del self._cached[key]
                self._keys[block] = None
            self._users[block] = 1
            taken.append(block)
        return taken

    def fill(self, block: int, key: Hashable) -> None:
        """The block is full now, and found by that key unless another holds the same already."""
        if self._keys[block] is None and key not in self._cached:
            self._keys[block] = key
            self._cached[key] = block

    def release(self, blocks: Sequence[int]) -> None:
        """A sequence gives its blocks back."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)
