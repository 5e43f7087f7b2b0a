"""Token sequences remembered by the hash of one of their full KV blocks, which covers everything before it."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class SequenceTable(Generic[Entry]):
    """Bounded, the oldest are forgotten first.

    Args:
        block_size: tokens per block.
        capacity: sequences remembered.
    """

    ALIKE = 64
    """Sequences remembered with the same hash: the same prompt sent for ever must not make look-ups long."""

    def __init__(self, block_size: int, capacity: int) -> None:
        self._block_size = block_size
        self._capacity = capacity
        self._by_hash: OrderedDict[Hashable, list[Entry]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def _keep(self, block: Hashable, entry: Entry) -> None:
        """Remembers one with this hash."""
        same = self._by_hash.setdefault(block, [])
        same.append(entry)
        self._by_hash.move_to_end(block)
        self._count += 1
        if len(same) > self.ALIKE:
            del same[0]
            self._count -= 1
        while self._count > self._capacity:
            _, forgotten = self._by_hash.popitem(last=False)
            self._count -= len(forgotten)
