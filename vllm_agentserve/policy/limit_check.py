"""Whether a limit gives as many turns per second as was expected of it, or far fewer.

The model of turns may be wrong, for example where something else slows the machine. Programs that were let in cannot be put out
again, but a limit can go at any time: so what it gives is counted while it is in force.
"""

from math import exp, inf

SETTLE_GAPS, SETTLE_S = 2.0, 1.0
"""After a limit came nothing is counted for so many mean gaps, or for so long if that is longer."""
TURNS, GAPS = 16, 2.0
"""A count ends with so many turns, and after so many mean gaps at least."""
FIRST = 0.25
"""A count with a larger share of first calls says nothing: their prompts are read once."""
BADLY = 0.55
"""A limit that gives more than this share of what is expected without one is left to the model: what that says of limits is often
too large, and as much of none."""
LEAST = 0.25
"""A limit is never thought to give less than this share of what was expected."""
FADE_S = 120.0
"""What was found counts 1/e after so long without another count."""
PAUSE_S = 2.0
"""Where no decision was asked for in so long, nobody waited, and the limit did not bound the rate: the count begins anew."""


class LimitCheck:
    """Counts turns while a limit is in force."""

    def __init__(self) -> None:
        self._found = 1.0
        self.found_s = -inf
        """When that was found, in s on the clock of the events."""
        self._asked_s = self._from_s = -inf
        self._turns = self._firsts = 0
        self._first_s = 0.0
        """Engine time of the prompts of first calls."""
        self._expected = self._without = 0.0
        self._asks = 0

    def share(self, now_s: float) -> float:
        """Of the turns per second that are expected of a limit, the share that it gives; 1 where nothing is known."""
        return 1.0 - (1.0 - self._found) * exp(-max(now_s - self.found_s, 0.0) / FADE_S) if self._found < 1.0 else 1.0

    def answered(self, first: bool, read_s: float) -> None:
        """A call ended.

        Args:
            first: whether it was the first of its program.
            read_s: engine time of its prompt, in s.
        """
        self._turns += 1
        self._firsts += first
        self._first_s += read_s if first else 0.0

    def expects(self, now_s: float, rate: float, without: float, gap_s: float) -> None:
        """A limit is in force, and somebody waits.

        Args:
            rate: turns per second that are expected with it.
            without: and without one.
            gap_s: the mean gap, in s.
        """
        if now_s - self._asked_s > PAUSE_S:
            self._from_s = now_s + max(SETTLE_GAPS * gap_s, SETTLE_S)
        self._asked_s = now_s
        if now_s < self._from_s:
            self._begin()
            return
        self._expected += rate
        self._without += without
        self._asks += 1
        took_s = now_s - self._from_s
        if self._turns < TURNS or took_s <= 0.0 or took_s < GAPS * gap_s:
            return
        if self._firsts <= FIRST * self._turns and self._expected:
            given = self._turns / max(took_s - self._first_s, 0.5 * took_s)
            badly = given * self._asks < BADLY * self._without
            self._found = min(max(given * self._asks / self._expected, LEAST), 1.0) if badly else 1.0
            self.found_s = now_s
        self._from_s = now_s
        self._begin()

    def _begin(self) -> None:
        self._turns = self._firsts = self._asks = 0
        self._first_s = self._expected = self._without = 0.0
