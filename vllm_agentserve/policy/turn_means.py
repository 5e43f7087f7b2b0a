"""What turns were like lately: means over about 32 of them."""

from math import exp, isfinite

TURNS_KEPT = 32.0
"""Samples after which an old one counts 1/e."""


class Mean:
    """A weighted mean of what was seen lately."""

    def __init__(self) -> None:
        self._fade = exp(-1 / TURNS_KEPT)
        self._sum = self._weight = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        if not isfinite(value):
            # It would stay for ever.
            return
        self._sum = self._sum * self._fade + value * weight
        self._weight = self._weight * self._fade + weight

    @property
    def value(self) -> float:
        """0 where nothing was seen."""
        return self._sum / self._weight if self._weight else 0.0


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
        self.read_s_per_token = Mean()
        self.whole_s_per_token = Mean()
        """Computing whole contexts anew, each in one go; short prompts take more per token, since each takes part of a step."""
        self.decode_s = Mean()
        self.beside_s = Mean()
        self.read_s = Mean()
        """Reading the prompt of a resumed call that found most of it."""

    @property
    def again_s_per_token(self) -> float:
        """Computing a context again; as measured with all prompts, where nobody says what that takes."""
        return self.whole_s_per_token.value or self.read_s_per_token.value

    def answered(
        self, read_s: float, read_tokens: int, decode_s: float, beside_s: float = 0.0, found: bool = False
    ) -> None:
        """A call ended that took so long."""
        if read_tokens:
            self.read_s_per_token.add(read_s / read_tokens, read_tokens)
        if found:
            self.read_s.add(read_s)
        self.decode_s.add(decode_s)
        self.beside_s.add(beside_s)
