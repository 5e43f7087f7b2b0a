"""When programs come back after a call, and whether they do: learned from what was seen, old samples fade.

A *gap* runs from the end of a program's last call to the arrival of its next one. Gaps are counted in logarithmic buckets,
so the share of longer gaps is known for any time. How fast this adapts:

- A distribution of gaps remembers about 64 gaps. Six in a row in its longest or its shortest twentieth leave the older ones a
  tenth of their weight.
- A share (of calls after which the program came back) remembers about 32 calls. A run of equal results that had a chance
  below 0.5 % leaves the older ones a tenth of their weight: three returns where there were none, eight or more where it was
  half.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import accumulate
from math import exp, log
from typing import TypeVar

SHORTEST_S, RATIO, BUCKETS = 0.005, 1.25, 88
"""Buckets: the first ends at 5 ms, each further one is longer by a quarter, the last begins after 15 days."""
GAPS_KEPT, CALLS_KEPT = 64.0, 32.0
"""Samples after which an old one counts 1/e, of gaps and of calls."""
STRANGE = 6
"""Gaps in a row on one side of the usual ones after which older ones count little."""
EDGE = 0.05
"""Share of the gaps on each side that are not usual."""
CHANCE = 0.005
"""Chance of a run of equal results below which older ones count little."""
LITTLE = 0.1
OWN_GAPS = 8
"""Gaps kept of a program."""
PRIOR = 4.0
"""Samples that what is known of all counts for, beside those of a tool or a program."""
TURN_PRIOR = 0.5
"""The same for a turn."""
TAIL = 2.0
"""Samples that stand for gaps longer than those seen. Their share falls to 1/e with so many mean gaps, or so many seconds if that
is longer: tools that were short so far say little about the next one."""
TAIL_GAPS, TAIL_S = 4.0, 1.0
NAMES = 128
"""Tools and turns kept."""

Entry = TypeVar("Entry")


def bucket(gap_s: float) -> int:
    """The bucket of a gap."""
    if gap_s <= SHORTEST_S:
        return 0
    return min(1 + int(log(gap_s / SHORTEST_S) / log(RATIO)), BUCKETS - 1)


MIDDLES_S = [SHORTEST_S * RATIO ** (index - 0.5) for index in range(BUCKETS)]
"""A gap of each bucket: the geometric middle."""


class Gaps:
    """A distribution of the gaps seen lately."""

    def __init__(self) -> None:
        self._fade = exp(-1 / GAPS_KEPT)
        self._weights = [0.0] * BUCKETS
        self._up_to = [0.0] * BUCKETS
        """Weight of each bucket and all below it."""
        self._strange = 0
        """Gaps in a row that were unusually long, or short if negative."""
        self.mean_s = 0.0
        """0 where none was seen."""

    @property
    def samples(self) -> float:
        """How many were seen lately; an old one counts less."""
        return self._up_to[-1]

    def add(self, gap_s: float) -> None:
        index = bucket(gap_s)
        fade = self._fade * (LITTLE if self._changed(index) else 1.0)
        self._weights = [weight * fade for weight in self._weights]
        self._weights[index] += 1.0
        self._up_to = list(accumulate(self._weights))
        self.mean_s = sum(weight * gap for weight, gap in zip(self._weights, MIDDLES_S, strict=True)) / self.samples

    def _changed(self, index: int) -> bool:
        """Whether so many gaps were strange that the traffic must be another."""
        longer = self.samples - self._up_to[index]
        shorter = self._up_to[index] - self._weights[index]
        edge, half = EDGE * self.samples, self.samples / 2
        if longer < edge and shorter > half:
            self._strange = max(self._strange, 0) + 1
        elif shorter < edge and longer > half:
            self._strange = min(self._strange, 0) - 1
        else:
            self._strange = 0
        if abs(self._strange) < STRANGE:
            return False
        self._strange = 0
        return True

    def longer(self, elapsed_s: float) -> float:
        """The share of gaps that are longer; 1 where none was seen."""
        if not self.samples:
            return 1.0
        index = bucket(elapsed_s)
        seen = self.samples - self._up_to[index] + self._weights[index] / 2
        return (seen + TAIL * exp(-elapsed_s / max(TAIL_GAPS * self.mean_s, TAIL_S))) / (self.samples + TAIL)


class OwnGaps:
    """The last gaps of one program. Small where there are none: most of the programs that are remembered had one call."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: tuple[float, ...] = ()

    def add(self, gap_s: float) -> None:
        self._last = (*self._last, gap_s)[-OWN_GAPS:]

    def longer(self, elapsed_s: float, others: float) -> float:
        """The share of gaps that are longer, where `others` is that share among more programs."""
        return (sum(gap > elapsed_s for gap in self._last) + PRIOR * others) / (len(self._last) + PRIOR)


class Share:
    """How often something was so lately."""

    def __init__(self) -> None:
        self._fade = exp(-1 / CALLS_KEPT)
        self._yes = self.samples = 0.0
        self._run = 0
        """The last so many were so, or were not if negative."""

    def add(self, so: bool) -> None:
        self._run = max(self._run, 0) + 1 if so else min(self._run, 0) - 1
        share = self.estimate(0.5, 1.0)
        fade = self._fade
        if self.samples and (share if so else 1 - share) ** abs(self._run) < CHANCE:
            fade *= LITTLE
            self._run = 0
        self._yes = self._yes * fade + so
        self.samples = self.samples * fade + 1

    def revise(self) -> None:
        """One that was counted as not so turned out to be so."""
        self._yes = min(self._yes + 1, self.samples)
        self._run = 0

    def estimate(self, prior: float, weight: float) -> float:
        """The share, where `prior` counts like so many samples."""
        return (self._yes + weight * prior) / (self.samples + weight)


class Returns:
    """Whether and when programs come back: of all, by turn and by tool. Until a return was seen there is none.

    A turn is the number of a call in its program, with whether the client names its programs; see `Turn`.
    """

    def __init__(self) -> None:
        self.gaps = Gaps()
        self._all = Share()
        self._turns: OrderedDict[Turn, Share] = OrderedDict()
        self._tools: OrderedDict[str, tuple[Gaps, Share]] = OrderedDict()

    def returned(self, turn: "Turn", tool: str | None, gap_s: float, revised: bool) -> None:
        """A program came back after its call of that turn; `revised` if it had been counted as gone."""
        self.gaps.add(gap_s)
        if tool is not None:
            self._of_tool(tool)[0].add(gap_s)
        for share in self._shares(turn, tool):
            if revised:
                share.revise()
            else:
                share.add(True)

    def gone(self, turn: "Turn", tool: str | None) -> None:
        """A program did not come back after its call of that turn."""
        for share in self._shares(turn, tool):
            share.add(False)

    def overall(self) -> float:
        """The probability that a program comes back after a call; 0 until a return was seen."""
        return self._all.estimate(0.5, 1.0) if self.gaps.samples else 0.0

    def begins(self, named: bool) -> float:
        """The probability that a program comes back after its first call, as seen with such programs; 0 if there were none."""
        first = self._turns.get((named, 1))
        return first.estimate(0.0, TURN_PRIOR) if first is not None else 0.0

    def seen(self, turn: "Turn") -> float:
        """How often programs were seen to come back or not after their call of that turn, lately."""
        found = self._turns.get(turn)
        return found.samples if found is not None else 0.0

    def probability(self, turn: "Turn", tool: str | None) -> float:
        """That a program comes back after its call of that turn."""
        found = self.overall()
        if not found:
            return 0.0
        if turn in self._turns:
            found = self._turns[turn].estimate(found, TURN_PRIOR)
        if tool is not None and tool in self._tools:
            found = self._tools[tool][1].estimate(found, PRIOR)
        return found

    def at_most(self, turn: "Turn") -> float:
        """The probability that a program comes back after its call of that turn, if one more had done so."""
        return self._turns.get(turn, self._all).estimate(1.0, 1.0)

    def longer(self, tool: str | None, elapsed_s: float) -> float:
        """The share of gaps that are longer."""
        others = self.gaps.longer(elapsed_s)
        if tool is None or tool not in self._tools:
            return others
        gaps = self._tools[tool][0]
        return (gaps.longer(elapsed_s) * gaps.samples + others * PRIOR) / (gaps.samples + PRIOR)

    def _shares(self, turn: "Turn", tool: str | None) -> Iterator[Share]:
        yield self._all
        yield kept(self._turns, turn, Share)
        if tool is not None:
            yield self._of_tool(tool)[1]

    def _of_tool(self, tool: str) -> tuple[Gaps, Share]:
        return kept(self._tools, tool, lambda: (Gaps(), Share()))


Turn = tuple[bool, int]
"""Whether the client names its programs, and the number of a call in its program, 1 for the first."""
Key = TypeVar("Key")


def kept(table: OrderedDict[Key, Entry], key: Key, make: Callable[[], Entry]) -> Entry:
    """The entry of that key, made where there is none; where there are too many, the longest unused goes."""
    if key not in table:
        table[key] = make()
        if len(table) > NAMES:
            table.popitem(last=False)
    table.move_to_end(key)
    return table[key]
