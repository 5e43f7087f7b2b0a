"""Host memory behind the KV cache, as decisions see it: how much it keeps, and what bringing it back takes."""


class HostTier:
    """Args:
    host_tokens: tokens whose KV host memory has room for; 0: there is none.
    """

    FORGETS = 0.9
    """What was measured before counts by this factor when more is measured."""

    def __init__(self, host_tokens: int = 0) -> None:
        self.host_tokens = host_tokens
        self._tokens = self._seconds = 0.0

    def restored(self, tokens: int, seconds: float) -> None:
        """The KV of so many tokens was copied back to the KV cache in so long, waiting not included."""
        if tokens > 0 and seconds > 0:
            self._tokens = self.FORGETS * self._tokens + tokens
            self._seconds = self.FORGETS * self._seconds + seconds

    @property
    def tokens_per_s(self) -> float | None:
        """How fast copies came back lately; None before the first one."""
        return self._tokens / self._seconds if self._seconds else None

    def restore_ms(self, tokens: int) -> float | None:
        """What copying so many tokens back takes. It goes on beside steps. None: nothing is known, or there is no host memory."""
        rate = self.tokens_per_s
        return None if rate is None else 1000 * tokens / rate


NO_HOST = HostTier()
