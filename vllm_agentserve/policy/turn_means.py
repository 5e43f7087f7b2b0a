"""What turns were like lately: means over about 32 of them."""

from math import exp

TURNS_KEPT = 32.0
"""Samples after which an old one counts 1/e."""


class Mean:
    """A weighted mean of what was seen lately."""

    def __init__(self) -> None:
        self._fade = exp(-1 / TURNS_KEPT)
        self._sum = self._weight = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self._sum = self._sum * self._fade + value * weight
        self._weight = self._weight * self._fade + weight

    @property
    def value(self) -> float:
        """0 where nothing was seen."""
        return self._sum / self._weight if self._weight else 0.0


SPREAD = 0.5
"""A line through prompts is worth something where the standard deviation of their lengths is so large a share of their mean."""
LEAST_SLOPE = 0.25
"""Of the mean time per token, what each further token takes at least."""


class ReadTimes:
    """What prompts took that were computed lately: some time for each, and some for each token."""

    def __init__(self) -> None:
        self._fade = exp(-1 / TURNS_KEPT)
        self._weight = self._tokens = self._squares = self._seconds = self._products = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        fade = self._fade
        self._weight = self._weight * fade + 1.0
        self._tokens = self._tokens * fade + tokens
        self._squares = self._squares * fade + tokens * tokens
        self._seconds = self._seconds * fade + seconds
        self._products = self._products * fade + tokens * seconds

    @property
    def s_per_token(self) -> float:
        """Of all tokens, what one took; 0 where nothing was seen."""
        return self._seconds / self._tokens if self._tokens else 0.0

    @property
    def s_per_further_token(self) -> float:
        """What a prompt takes longer for each token that it is longer: a line through what was seen, where lengths differ.

        Short prompts take more per token, since each takes part of a step; of a long one that says nothing.
        """
        spread = self._squares * self._weight - self._tokens * self._tokens
        if spread < (SPREAD * self._tokens) ** 2:
            return self.s_per_token
        slope = (self._products * self._weight - self._tokens * self._seconds) / spread
        return min(max(slope, LEAST_SLOPE * self.s_per_token), self.s_per_token)


class TurnMeans:
    """What a turn takes, and what its context is like."""

    def __init__(self) -> None:
        self.hits = Mean()
        """Share of the context that a resumed call found."""
        self.parts = Mean()
        """Of the most that a program will want, the share that a resumed call has: contexts grow, and sub-agents have less."""
        self.growth = Mean()
        """Tokens by which a context is longer after a turn."""
        self.new_tokens = Mean()
        """Tokens of a resumed call's prompt that its program did not have before."""
        self.reads = ReadTimes()
        self.decode_s = Mean()
        self.beside_s = Mean()
        self.read_s = Mean()
        """Reading the prompt of a resumed call that found most of it."""

    def answered(
        self, read_s: float, read_tokens: int, decode_s: float, beside_s: float = 0.0, found: bool = False
    ) -> None:
        """A call ended that took so long."""
        if read_tokens:
            self.reads.add(read_tokens, read_s)
        if found:
            self.read_s.add(read_s)
        self.decode_s.add(decode_s)
        self.beside_s.add(beside_s)
