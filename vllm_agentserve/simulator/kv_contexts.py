"""The KV cache of one engine by conversation: contexts that run are protected, of the others the longest unused goes first."""

from collections import OrderedDict


class KvContexts:
    """Tokens of contexts. Conversations share nothing.

    Args:
        capacity: tokens of all contexts together.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.running = 0
        """Tokens that calls have taken, those they will write included."""
        self._idle: OrderedDict[str, int] = OrderedDict()
        self._idle_tokens = 0

    def cached(self, name: str) -> int:
        """Tokens of a conversation's context that are there, from its beginning."""
        return self._idle.get(name, 0)

    def begin(self, name: str, tokens: int) -> bool:
        """A call takes its conversation's context, up to so many tokens. False where it has no room while others run."""
        if tokens > self.capacity:
            raise ValueError(f"a context of {tokens} tokens does not fit into a KV cache of {self.capacity}")
        if self.running + tokens > self.capacity:
            return False
        self._idle_tokens -= self._idle.pop(name, 0)
        self.running += tokens
        self._shrink()
        return True

    def end(self, name: str, tokens: int) -> None:
        """A call leaves its context there."""
        self.running -= tokens
        self._idle_tokens += tokens - self._idle.pop(name, 0)
        self._idle[name] = tokens

    def clear(self) -> None:
        """All is lost."""
        self._idle.clear()
        self.running = self._idle_tokens = 0

    def _shrink(self) -> None:
        """As in vLLM, the end of a context goes before its beginning."""
        over = self.running + self._idle_tokens - self.capacity
        while over > 0:
            name, tokens = next(iter(self._idle.items()))
            gone = min(tokens, over)
            if gone == tokens:
                del self._idle[name]
            else:
                self._idle[name] = tokens - gone
            self._idle_tokens -= gone
            over -= gone
