"""Host memory behind the KV blocks of an engine, as vLLM's OffloadingConnector uses it."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


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

    def hits(self, keys: Iterable[Hashable]) -> int:
        """How many blocks at the beginning of such a sequence are kept."""
        found = 0
        for key in keys:
            if key not in self._copies:
                break
            found += 1
        return found

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
