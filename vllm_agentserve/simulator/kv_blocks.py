"""The KV blocks of one engine as vLLM's block pool keeps them: shared by prefix, the longest unused are given away first."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from vllm_agentserve.policy.retention import Retention


class KvBlocks:
    """Blocks with reference counts, a prefix cache, and a queue of free blocks.

    A block that nobody uses stays in the prefix cache until it is handed out again. Freed blocks with contents go to the end of
    the free queue, the last block of a sequence first; freed blocks without contents go to its front (`block_pool.py` of vLLM).

    Args:
        blocks: that can be handed out; vLLM keeps one more for itself.
        tokens: per block.
        retention: which programs' blocks are handed out last; None as in stock vLLM.
    """

    def __init__(self, blocks: int, tokens: int, retention: Retention | None = None) -> None:
        self.tokens = tokens
        self.retention = retention
        self._chains: dict[str, list[int]] = {}
        """Blocks of the programs that are kept."""
        self._kept: dict[str, OrderedDict[int, None]] = {}
        """Those of them that nobody uses; handed out last, the end of a context first."""
        self._keeper: dict[int, str] = {}
        self.broken = 0
        """Kept blocks that were handed out."""
        self.capacity = blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._users = [0] * blocks
        self._keys: list[Hashable | None] = [None] * blocks
        self._cached: dict[Hashable, int] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody uses, cached or not."""
        return len(self._free) + len(self._keeper)

    @property
    def ordinary(self) -> int:
        """Those of them that are not kept for a program."""
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
                keeper = self._keeper.pop(block, None)
                del (self._free if keeper is None else self._kept[keeper])[block]
            self._users[block] += 1
        return taken

    def allocate(self, count: int) -> list[int]:
        """So many blocks from the front of the free queue; what they held is lost. There must be as many."""
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False) if self._free else (self._break(), None)
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
                self._put(block, blocks)

    def _put(self, block: int, context: Sequence[int]) -> None:
        if self._keys[block] is None:
            self._free[block] = None
            self._free.move_to_end(block, last=False)
            return
        if self._chains:
            index = context.index(block)
            for name, chain in self._chains.items():
                if index < len(chain) and chain[index] == block:
                    self._kept[name][block] = None
                    self._keeper[block] = name
                    return
        self._free[block] = None

    # Retention; in the engine: `kv/ledger.py`.

    def own(self, name: str, blocks: Sequence[int]) -> int:
        """How many of a program's full blocks no program has that was kept before it."""
        shared = 0
        for other, chain in self._chains.items():
            if other == name:
                break
            shared = max(shared, common(blocks, chain))
        return sum(self._keys[block] is not None for block in blocks) - shared

    def keep(self, name: str, blocks: Sequence[int]) -> None:
        """The program's blocks are kept when they are released."""
        if name in self._chains:
            self._empty(name)
        self._chains[name] = [block for block in blocks if self._keys[block] is not None]
        self._kept[name] = OrderedDict()

    def give_up(self, name: str) -> None:
        """The program's blocks are not kept any more, except those that others share."""
        if name not in self._chains:
            return
        names = [*self._chains]
        left = self._chains[name]
        paid = max((common(left, self._chains[one]) for one in names[: names.index(name)]), default=0)
        for other in names[names.index(name) + 1 :]:
            shared = common(left, self._chains[other])
            if shared > paid:
                assert self.retention is not None
                self.retention.resize(other, shared - paid)
                paid = shared
        del self._chains[name]
        self._empty(name)
        del self._kept[name]

    def _empty(self, name: str) -> None:
        """Blocks that nobody uses go to another program that shares them, or to the ordinary ones."""
        for block in [*self._kept[name]]:
            del self._kept[name][block], self._keeper[block]
            other = next((one for one, chain in self._chains.items() if one != name and block in chain), None)
            if other is None:
                self._free[block] = None
            else:
                self._kept[other][block] = None
                self._keeper[block] = other

    def _break(self) -> int:
        """A kept block, as nothing else is left."""
        assert self.retention is not None
        name = self.retention.first_out([one for one, blocks in self._kept.items() if blocks])
        block, _ = self._kept[name].popitem(last=False)
        del self._keeper[block]
        for chain in self._chains.values():
            if block in chain:
                del chain[chain.index(block) :]
        self.retention.resize(name, -1)
        self.broken += 1
        if not self._chains[name]:
            self.retention.release(name)
            self.give_up(name)
        return block


def common(blocks: Sequence[int], others: Sequence[int]) -> int:
    """How many blocks two contexts have in common."""
    pairs = enumerate(zip(blocks, others, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(blocks), len(others)))
