"""When a program comes back after a call, and whether it does: learned from what was seen, newest first.

A *gap* runs from the end of a program's last call to the arrival of its next. Gaps are kept as a histogram over logarithmic
buckets, so that any quantile can be asked; what is old fades.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from math import exp, log

SHORTEST_S, RATIO, BUCKETS = 0.005, 1.25, 88
"""Buckets: the first ends at 5 ms, each further one is a quarter longer, the last begins after twenty days."""
STRANGE = 6
"""Gaps in a row, all shorter or all longer than what is usual, after which the old ones count a tenth."""
USUAL = 0.9
"""Share of the gaps that are usual, in the middle of the distribution."""
OWN_GAPS = 8
"""Gaps kept of a program."""
PRIOR = 4.0
"""Samples that what is known of more programs counts for, beside those of a tool or a program."""
TURN_PRIOR = 0.5
CHANCE = 0.005
TAIL = 0.5
"""Samples that stand for gaps longer than all that were seen."""
NAMES = 64
"""Tools and turns kept."""


def bucket(gap_s: float) -> int:
    """The bucket of a gap."""
    if gap_s <= SHORTEST_S:
        return 0
    return min(1 + int(log(gap_s / SHORTEST_S) / log(RATIO)), BUCKETS - 1)


def length(index: int) -> float:
    """A gap of that bucket, in s: the geometric middle."""
    return float(SHORTEST_S * RATIO ** (index - 0.5))


class Gaps:
    """Gaps seen lately.

    Args:
        memory: samples after which an old one counts 1/e.
    """

    def __init__(self, memory: float = 64.0) -> None:
        self._fade = exp(-1 / memory)
        self._weights = [0.0] * BUCKETS
        self.samples = 0.0
        """Seen lately; an old one counts less."""
        self._strange = 0
        """Gaps in a row beyond what is usual: negative for short ones."""

    def add(self, gap_s: float) -> None:
        """Takes in a gap. A run of strange ones makes the old ones count little: the traffic is another."""
        index = bucket(gap_s)
        self._notice(index)
        self._scale(self._fade)
        self._weights[index] += 1.0
        self.samples += 1.0

    def _scale(self, factor: float) -> None:
        self._weights = [weight * factor for weight in self._weights]
        self.samples *= factor

    def _notice(self, index: int) -> None:
        if self.samples < STRANGE:
            return
        below = sum(self._weights[:index])
        above = sum(self._weights[index + 1 :])
        edge = (1 - USUAL) / 2 * self.samples
        if below >= edge and above >= edge:
            self._strange = 0
            return
        side = 1 if above < edge else -1
        self._strange = self._strange + side if self._strange * side >= 0 else side
        if abs(self._strange) >= STRANGE:
            self._scale(0.1)
            self._strange = 0

    def survival(self, elapsed_s: float) -> float:
        """The share of gaps that are longer; half a sample stands for gaps longer than those seen, 1 where none were seen."""
        index = bucket(elapsed_s)
        longer = sum(self._weights[index + 1 :]) + self._weights[index] / 2
        return (longer + TAIL * self._tail(elapsed_s)) / (self.samples + TAIL)

    def _tail(self, elapsed_s: float) -> float:
        mean = self.mean_s
        return 1.0 if mean is None else exp(-elapsed_s / (2 * mean))

    @property
    def mean_s(self) -> float | None:
        """None where none were seen."""
        if not self.samples:
            return None
        return sum(weight * length(index) for index, weight in enumerate(self._weights) if weight) / self.samples


class Share:
    """How often something was so, lately.

    Args:
        memory: samples after which an old one counts 1/e.
    """

    def __init__(self, memory: float = 32.0) -> None:
        self._fade = exp(-1 / memory)
        self.yes = 0.0
        self.samples = 0.0
        self._alike = 0
        """The last so many were yes, or no if negative."""

    def add(self, so: bool) -> None:
        self._notice(so)
        self.yes = self.yes * self._fade + so
        self.samples = self.samples * self._fade + 1

    def _notice(self, so: bool) -> None:
        side = 1 if so else -1
        self._alike = self._alike + side if self._alike * side > 0 else side
        if not self.samples:
            return
        share = self.estimate(0.5, 1.0)
        if (share if so else 1 - share) ** abs(self._alike) < CHANCE:
            self.yes, self.samples = self.yes * 0.1, self.samples * 0.1
            self._alike = 0

    def revise(self) -> None:
        """One that was taken for a no was a yes."""
        self.yes = min(self.yes + 1, self.samples)

    def estimate(self, prior: float, weight: float = PRIOR) -> float:
        """The share, where `prior` counts like so many samples."""
        return (self.yes + weight * prior) / (self.samples + weight)


class OwnGaps:
    """The last gaps of one program, beside those of others."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=OWN_GAPS)

    def add(self, gap_s: float) -> None:
        self._last.append(gap_s)

    def survival(self, elapsed_s: float, others: float) -> float:
        """The share of gaps that are longer, where `others` is that share among more programs."""
        longer = sum(gap > elapsed_s for gap in self._last)
        return (longer + PRIOR * others) / (len(self._last) + PRIOR)


class Returning:
    """Whether and when programs come back: by turn and by tool, beside all of them.

    Until a return was seen there are none: every estimate is 0.
    """

    def __init__(self) -> None:
        self.gaps = Gaps()
        self.all = Share(memory=64.0)
        self._turns: OrderedDict[str, Share] = OrderedDict()
        self._tools: OrderedDict[str, tuple[Gaps, Share]] = OrderedDict()

    def returned(self, turn: str, tool: str | None, gap_s: float, revised: bool) -> None:
        """A program came back after its call of that turn, which had been taken for its end if `revised`."""
        self.gaps.add(gap_s)
        if tool is not None:
            self._of_tool(tool)[0].add(gap_s)
        for share in self._shares(turn, tool):
            if revised:
                share.revise()
            else:
                share.add(True)

    def gone(self, turn: str, tool: str | None) -> None:
        """A program did not come back after its call of that turn."""
        for share in self._shares(turn, tool):
            share.add(False)

    def probability(self, turn: str, tool: str | None) -> float:
        """That a program comes back after its call of that turn."""
        if not self.gaps.samples:
            return 0.0
        found = self.all.estimate(0.5, 1.0)
        if turn in self._turns:
            found = self._turns[turn].estimate(found, TURN_PRIOR)
        if tool in self._tools:
            found = self._tools[tool][1].estimate(found)
        return found

    def survival(self, tool: str | None, elapsed_s: float) -> float:
        """The share of gaps that are longer."""
        others = self.gaps.survival(elapsed_s)
        if tool not in self._tools:
            return others
        gaps = self._tools[tool][0]
        return (gaps.survival(elapsed_s) * gaps.samples + others * PRIOR) / (gaps.samples + PRIOR)

    def _shares(self, turn: str, tool: str | None) -> Iterable[Share]:
        yield self.all
        yield kept(self._turns, turn, Share)
        if tool is not None:
            yield self._of_tool(tool)[1]

    def _of_tool(self, tool: str) -> tuple[Gaps, Share]:
        return kept(self._tools, tool, lambda: (Gaps(), Share()))


def kept(table, name, make):  # type: ignore[no-untyped-def]
    """The entry of that name, made where there is none; of too many the longest unused goes."""
    if name not in table:
        table[name] = make()
        if len(table) > NAMES:
            table.popitem(last=False)
    table.move_to_end(name)
    return table[name]
