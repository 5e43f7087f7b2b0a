"""Host memory behind the KV cache, as load control sees it: how much it keeps, and how long a context takes to come back."""

from dataclasses import dataclass
from typing import Protocol


class Tier(Protocol):
    """Keeps copies of KV blocks: those that were used last, also while they are in the KV cache."""

    @property
    def host_tokens(self) -> int:
        """Tokens whose KV it keeps; 0 without such memory."""

    def restore_ms(self, tokens: int) -> float | None:
        """How long so many tokens take to come back; None while that is not known."""


@dataclass(frozen=True)
class UnmeasuredTier:
    """One whose copies nobody measures.

    Args:
        host_tokens: what it keeps.
    """

    host_tokens: int = 0

    def restore_ms(self, tokens: int) -> float | None:
        return None
