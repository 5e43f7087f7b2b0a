"""Which free KV blocks are kept for programs that come back: by program its context, and those of its blocks that nobody uses.

vLLM keeps free blocks in one linked list, and hands out from its front. Kept blocks are in lists of their own, one for each
program, with the end of its context in front. They count as free like all others; see `vllm_compat/free_blocks.py`.

A context is a list of blocks from the first token on, and contexts that begin alike have the same blocks. So whether and how far
two contexts agree is found by bisection, and a block's place in its context by the tokens it ends with: nothing is done block by
block when a call ends.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

Block = Any
"""vLLM's `KVCacheBlock`: `prev_free_block`, `next_free_block`, `ref_cnt`, `block_hash`, `block_hash_num_tokens`."""


class Keeper(Protocol):
    """Decides which programs are kept: `policy/retention.py`."""

    def first_out(self, names: Collection[str]) -> str:
        """Whose blocks go first when nothing else is left."""

    def resize(self, name: str, blocks: int) -> None:
        """The program has so many blocks more of its own, or fewer."""

    def release(self, name: str) -> None:
        """The program is not kept any more."""


class End:
    """An end of a linked list of blocks."""

    __slots__ = ("next_free_block", "prev_free_block", "segment")

    def __init__(self, segment: "Segment") -> None:
        self.prev_free_block: Block = None
        self.next_free_block: Block = None
        self.segment = segment


class Segment:
    """The free blocks of one program, a linked list like vLLM's."""

    __slots__ = ("context", "head", "tail")

    def __init__(self, context: list[Block]) -> None:
        self.context = context
        """All its blocks, from the first token on, in use or not."""
        self.head, self.tail = End(self), End(self)
        self._clear()

    def _clear(self) -> None:
        self.head.next_free_block, self.tail.prev_free_block = self.tail, self.head

    def __bool__(self) -> bool:
        """Whether there are free ones."""
        return self.head.next_free_block is not self.tail

    def __iter__(self) -> Iterator[Block]:
        """The free ones, in the order in which they are handed out."""
        block = self.head.next_free_block
        while block is not self.tail:
            yield block
            block = block.next_free_block

    def add(self, blocks: Sequence[Block]) -> None:
        """Puts blocks that became free at the end."""
        last = self.tail.prev_free_block
        for block in blocks:
            block.prev_free_block = last
            last.next_free_block = block
            last = block
        last.next_free_block = self.tail
        self.tail.prev_free_block = last

    def pop(self, most: int) -> list[Block]:
        """Takes up to so many from the front."""
        found: list[Block] = []
        block = self.head.next_free_block
        while len(found) < most and block is not self.tail:
            found.append(block)
            following = block.next_free_block
            block.prev_free_block = block.next_free_block = None
            block = following
        self.head.next_free_block, block.prev_free_block = block, self.head
        return found

    def move(self, first: Block, before: Block) -> None:
        """Moves the blocks from `first` on to another list, before its block or end `before`."""
        last = self.tail.prev_free_block
        # Out of this list,
        self.tail.prev_free_block, first.prev_free_block.next_free_block = first.prev_free_block, self.tail
        # and into the other.
        first.prev_free_block, before.prev_free_block.next_free_block = before.prev_free_block, first
        before.prev_free_block, last.next_free_block = last, before


def common(blocks: Sequence[Block], others: Sequence[Block]) -> int:
    """How many blocks two contexts have in common."""
    low, high = 0, min(len(blocks), len(others))
    if not high or blocks[0] is not others[0]:
        return 0
    if blocks[high - 1] is others[high - 1]:
        return high
    while low + 1 < high:
        middle = (low + high) // 2
        if blocks[middle] is others[middle]:
            low = middle
        else:
            high = middle
    return low + 1


class Ledger:
    """Args:
    block_tokens: of a KV block.
    keeper: decides.
    ordinary_end: the end of the list of blocks that are not kept.
    """

    def __init__(self, block_tokens: int, keeper: Keeper, ordinary_end: Block) -> None:
        self._block = block_tokens
        self._keeper = keeper
        self._end = ordinary_end
        self.segments: dict[str, Segment] = {}
        """By program; the first to be kept first."""
        self.broken = 0
        """Kept blocks that were handed out, since the start."""

    # What is decided.

    def own(self, name: str, context: Sequence[Block]) -> int:
        """How many of these blocks no program has that was kept before this one."""
        shared = 0
        for other, segment in self.segments.items():
            if other == name:
                break
            if len(segment.context) > shared:
                shared = max(shared, common(context, segment.context))
        return len(context) - shared

    def keep(self, name: str, context: list[Block]) -> None:
        """The blocks of this context are kept when they become free; those of the program's last one are not any more."""
        before = self.segments.get(name)
        self.segments[name] = Segment(context)
        if before is not None:
            agree = common(before.context, context)
            if agree < len(before.context):
                self._pay(name, before.context, agree)
            self._let_go(before)

    def give_up(self, name: str) -> None:
        """The program's blocks are not kept any more, but those that others share."""
        left = self.segments.get(name)
        if left is None:
            return
        self._pay(name, left.context, 0)
        del self.segments[name]
        self._let_go(left)

    def _pay(self, name: str, context: Sequence[Block], paid: int) -> None:
        """Blocks that the program was the first to keep are now those of the next ones that have them, but the first `paid`."""
        earlier = True
        for other, segment in self.segments.items():
            if other == name:
                earlier = False
            elif len(segment.context) > paid:
                shared = common(context, segment.context)
                if shared > paid:
                    if not earlier:
                        self._keeper.resize(other, shared - paid)
                    paid = shared

    def clear(self) -> None:
        """Nothing is kept any more."""
        for name, segment in self.segments.items():
            if segment:
                segment.move(segment.head.next_free_block, self._end)
            self._keeper.release(name)
        self.segments.clear()

    def _let_go(self, left: Segment) -> None:
        """Free blocks go to another program that has them too; the others to the end of those that are not kept."""
        if not left:
            return
        heir, shared = self._heir(left)
        if heir is not None:
            self._inherit(left, heir, shared)
        if left:
            left.move(left.head.next_free_block, self._end)

    def _heir(self, of: Segment) -> tuple[Segment | None, int]:
        """The program whose context has most in common with this one, and how many blocks that is."""
        heir, shared = None, 0
        for segment in self.segments.values():
            if segment is not of and len(segment.context) > shared:
                found = common(of.context, segment.context)
                if found > shared:
                    heir, shared = segment, found
        return heir, shared

    def _inherit(self, left: Segment, heir: Segment, shared: int) -> None:
        first = left.tail
        while first.prev_free_block is not left.head and self._ends(first.prev_free_block) <= shared:
            first = first.prev_free_block
        if first is not left.tail:
            left.move(first, heir.tail)

    def _ends(self, block: Block) -> int:
        """How many blocks a context has up to the end of this one; 0 for a block that was taken out of the cache."""
        return int(block.block_hash_num_tokens or 0) // self._block

    # What vLLM's queue asks.

    def place(self, blocks: list[Block]) -> list[Block]:
        """Takes in what is kept of blocks that become free, the end of a context first; returns the others."""
        at = self._ends(blocks[-1]) - 1
        best, most = None, 0
        for segment in self.segments.values():
            context = segment.context
            if len(context) > at + most and at >= 0 and context[at] is blocks[-1]:
                found = self._agree(blocks, context, at)
                if found > most:
                    best, most = segment, found
                    if most == len(blocks):
                        break
        if best is None:
            return blocks
        if most == len(blocks):
            best.add(blocks)
            return []
        best.add(blocks[-most:])
        return blocks[:-most]

    @staticmethod
    def _agree(blocks: Sequence[Block], context: Sequence[Block], at: int) -> int:
        """How many blocks from the last one backwards are those of a context from `at` on; the last one is."""
        low, high = 1, min(len(blocks), len(context) - at)
        if blocks[-high] is context[at + high - 1]:
            return high
        while low + 1 < high:
            middle = (low + high) // 2
            if blocks[-middle] is context[at + middle - 1]:
                low = middle
            else:
                high = middle
        return low

    def hand_out(self, number: int) -> list[Block]:
        """So many kept blocks, or all there are: nothing else is left."""
        found: list[Block] = []
        while len(found) < number:
            names = [name for name, segment in self.segments.items() if segment]
            if not names:
                break
            name = self._keeper.first_out(names)
            segment = self.segments[name]
            heir, shared = self._heir(segment)
            if heir is not None:
                self._inherit(segment, heir, shared)
            taken = segment.pop(number - len(found))
            found += taken
            if not segment:
                # What is left of its context is in use, or that of others.
                self._keeper.release(name)
                self.give_up(name)
            elif taken:
                ends = self._ends(taken[-1])
                if ends:
                    del segment.context[ends - 1 :]
                self._keeper.resize(name, -len(taken))
        self.broken += len(found)
        return found

    def after(self, end: Block) -> Iterator[Block]:
        """All kept blocks that come after the list with this end, in the order of the programs."""
        found = not isinstance(end, End)
        for segment in self.segments.values():
            if found:
                yield from segment
            found = found or segment.tail is end

    # What is seen.

    @property
    def programs(self) -> int:
        return len(self.segments)

    def faults(self) -> list[str]:
        """What does not agree; O(blocks)."""
        found = []
        seen: set[int] = set()
        for name, segment in self.segments.items():
            before: Block = segment.head
            for block in segment:
                if block.prev_free_block is not before:
                    found.append(f"KV block {block.block_id} of {name!r} is not linked with the one before it")
                    break
                if block.ref_cnt or block.block_id in seen:
                    found.append(f"KV block {block.block_id} is kept for {name!r}, and is in use or kept twice")
                seen.add(block.block_id)
                before = block
        return found
