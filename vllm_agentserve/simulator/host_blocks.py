"""Host memory behind the KV blocks of an engine, as vLLM's OffloadingConnector uses it."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class HostLink:
    """The host memory and the way back from it.

    Args:
        host_tokens: tokens whose KV it keeps.
        load_ms: what every restore takes, however short.
        token_ms: and what each of its tokens takes.
        told: whether load control knows that.
    """

    host_tokens: int = 0
    load_ms: float = 0.0
    token_ms: float = 0.0
    told: bool = True

    def takes_ms(self, tokens: int) -> float:
        return self.load_ms + self.token_ms * tokens

    def restore_ms(self, tokens: int) -> float | None:
        return self.takes_ms(tokens) if self.told else None


NO_HOST = HostLink()


@dataclass(slots=True)
class Filling:
    """A call, as host memory sees it.

    Args:
        program: its own name, not that of a program which started it.
        named: whether its client names it.
        offered: blocks at the beginning of its context that need not be offered any more: they were, or came back.
        seen: the first of its blocks that it offered or got back.
        stored, missed: what an `arc` remembers of it.
    """

    program: str
    named: bool = True
    offered: int = 0
    seen: int = 0
    stored: set[Hashable] = field(default_factory=set)
    missed: set[Hashable] = field(default_factory=set)

    def restored(self, cached: int, blocks: int) -> None:
        """So many blocks came back behind the cached ones, which are not offered then."""
        self.seen = min(self.seen, cached) if self.offered else cached
        self.offered = cached + blocks


class HostBlocks:
    """Copies of blocks: stored as soon as these are full, which takes no time here; the longest unused go first.

    A context is used when its call ends, its beginning last. Restores take the link one after the other.

    Args:
        tokens: per block.
    """

    def __init__(self, link: HostLink, tokens: int) -> None:
        self._link = link
        self._tokens = tokens
        self._capacity = link.host_tokens // tokens
        self._copies: OrderedDict[Hashable, None] = OrderedDict()
        self._free_s = 0.0
        """When the link has nothing more to do."""

    def __len__(self) -> int:
        return len(self._copies)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._copies

    def hits(self, keys: Iterable[Hashable]) -> int:
        """How many blocks at the beginning of such a sequence are kept."""
        found = 0
        for key in keys:
            if key not in self:
                break
            found += 1
        return found

    def arrive(self, call: Filling, now_s: float) -> None:
        """A call came, and waits."""

    def admit(self, call: Filling) -> None:
        """It runs."""

    def fill(self, call: Filling, keys: Sequence[Hashable], first: int, now_s: float) -> None:
        """These blocks of a call are full, those from `first` on since now."""
        self.use(keys[first:])

    def end(self, call: Filling, keys: Sequence[Hashable], now_s: float, last: bool) -> None:
        """The call ended; whether its client says that its program ends with it."""
        self.use(keys)

    def use(self, keys: Sequence[Hashable]) -> None:
        """These blocks have been filled, or their call has ended."""
        if not self._capacity:
            return
        for key in reversed(keys):
            self._copies[key] = None
            self._copies.move_to_end(key)
        while len(self._copies) > self._capacity:
            self._copies.popitem(last=False)

    def restored_s(self, blocks: int, now_s: float) -> float:
        """When so many blocks are back."""
        self._free_s = max(self._free_s, now_s) + self._link.takes_ms(blocks * self._tokens) / 1000
        return self._free_s
