"""Token sequences remembered by the hash of one of their full KV blocks, which covers everything before it."""

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar

ENTRY_BYTES = 512
"""What an entry takes besides its tokens, with its hash and its places in dictionaries and lists."""
MOST_BYTES = 16 << 20
"""What a table may take."""


class Tokens(Protocol):
    """An entry of a table."""

    def token_arrays(self) -> "Iterator[array[int]]":
        """The tokens that it keeps."""
        ...


Entry = TypeVar("Entry", bound=Tokens)


class SequenceTable(Generic[Entry]):
    """Bounded in number and in bytes, the oldest are forgotten first.

    Args:
        block_size: tokens per block.
        capacity: sequences remembered.
        most_bytes: that they may take: long blocks have long tails, and a number of them says little.
    """

    ALIKE = 64
    """Sequences remembered with the same hash: the same prompt sent for ever must not make look-ups long."""

    def __init__(self, block_size: int, capacity: int, most_bytes: int = MOST_BYTES) -> None:
        self._block_size = block_size
        self._capacity = capacity
        self._most_bytes = most_bytes
        self.size_bytes = 0
        """About what the table takes."""
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
        self.size_bytes += bytes_of(entry)
        if len(same) > self.ALIKE:
            self._forget(same.pop(0))
        while self._by_hash and (self._count > self._capacity or self.size_bytes > self._most_bytes):
            for forgotten in self._by_hash.popitem(last=False)[1]:
                self._forget(forgotten)

    def _forget(self, entry: Entry) -> None:
        self._count -= 1
        self.size_bytes -= bytes_of(entry)


def bytes_of(entry: Tokens) -> int:
    """About what an entry takes."""
    return ENTRY_BYTES + sum(len(tokens) * tokens.itemsize for tokens in entry.token_arrays())
