"""When each program is expected back after a call, if at all: what decides whose KV is kept.

Everything is said with the time at which it happened, in seconds of any clock.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import Generic, TypeVar

from vllm_agentserve.policy.claims import LAPSE, SLOWER, SLOWER_S, TURNS_APART
from vllm_agentserve.policy.gaps import MIDDLES_S, OwnGaps, Returns, Turn

LEAST = 0.5
"""Programs that are less likely to come back are not expected, at the end of a call or later on."""
GRACE = 1.25
"""Expected so many times as long as that takes, or as all but `LAPSE` of the gaps are."""
LOOK_AHEAD = 4
"""Programs that are away and looked at again whenever a call comes."""
PROGRAMS_KEPT = 65_536
"""Programs remembered, the longest unseen are forgotten first. More only while all that are looked at have calls, or copies."""
FORGET_AHEAD = 64
"""Programs that are looked at for one to forget whenever one comes."""


@dataclass(slots=True, eq=False)
class Program:
    """A program between its calls.

    Args:
        name: unique.
        named: whether its client names it.
        calls: that wait or run.
        turns: calls that ended.
        ended_s: when the last one did.
        tool: what it does since, if that was said.
        due_s: half of the programs like it are back by then.
        gone_s: nearly all of those that come back are, by then.
        gone: whether it was counted as one that does not come back.
        likely: the probability that it comes back.
    """

    name: str
    named: bool
    calls: int = 0
    turns: int = 0
    ended_s: float = 0.0
    tool: str | None = None
    due_s: float = 0.0
    gone_s: float = inf
    gone: bool = False
    likely: float = 0.0
    own: OwnGaps = field(default_factory=OwnGaps)

    def turn(self) -> Turn:
        return self.named, min(max(self.turns, 1), TURNS_APART)


Kind = TypeVar("Kind", bound=Program)


class ExpectedBack(Generic[Kind]):
    """Args:
    kind: makes the record of a program.
    returns: when and whether programs come back, where somebody else learns it; it is learned here otherwise.
    """

    def __init__(self, kind: type[Kind], returns: Returns | None = None) -> None:
        self._kind = kind
        self._learns = returns is None
        self.returns = Returns() if returns is None else returns
        self._programs: OrderedDict[str, Kind] = OrderedDict()
        """All that are remembered, the longest unseen first."""
        self._now_s = 0.0

    def _arrives(self, name: str, now_s: float, named: bool) -> Kind:
        """A call of the program came."""
        self._now_s = now_s
        program = self._programs.get(name)
        if program is None:
            program = self._programs[name] = self._kind(name, named)
        elif not program.calls and program.turns:
            gap = now_s - program.ended_s
            program.own.add(gap)
            if self._learns:
                self.returns.returned(program.turn(), program.tool, gap, revised=program.gone)
            program.gone = False
        self._programs.move_to_end(name)
        program.calls += 1
        if len(self._programs) > PROGRAMS_KEPT:
            self._forget_one()
        return program

    def _ends(self, name: str, now_s: float, last: bool, tool: str | None, can_return: bool) -> Kind | None:
        """A call of the program ended; None if the program is not remembered."""
        program = self._programs.get(name)
        if program is None:
            return None
        program.calls = max(program.calls - 1, 0)
        program.turns += 1
        program.ended_s, program.tool = now_s, tool
        self._expect(program, now_s, last or not can_return)
        if last and self._learns:
            self.returns.gone(program.turn(), tool)
            program.gone = True
        return program

    def _aborts(self, name: str, now_s: float) -> Kind | None:
        """A call ended without an answer. The program stays as it is, and its time begins again."""
        self._now_s = now_s
        program = self._programs.get(name)
        if program is None:
            return None
        program.calls = max(program.calls - 1, 0)
        if not program.calls:
            program.ended_s = now_s
            self._expect(program, now_s, over=False)
        return program

    def _expect(self, program: Kind, now_s: float, over: bool) -> None:
        """When it is expected back, if at all."""
        self._now_s = now_s
        likely = 0.0 if over else self.returns.probability(program.turn(), program.tool)
        # Among prompts that nobody ever went on from, the first of a program is taken for one of them.
        program.likely = min(likely, self.returns.begins(program.named)) if program.turns == 1 else likely
        program.due_s = now_s + self._within(program, 0.5)
        # Of those that are still away when this share of the gaps is longer, as many come back as do not, if `LEAST` is a half.
        odds = LEAST / (1 - LEAST) * (1 - program.likely) / max(program.likely, LEAST)
        program.gone_s = now_s + GRACE * self._within(program, max(LAPSE, min(odds, LEAST)))

    def _within(self, program: Kind, share: float) -> float:
        """The shortest time that no more than this share of its gaps exceed."""
        low, high = 0, len(MIDDLES_S) - 1
        while low < high:
            middle = (low + high) // 2
            away_s = MIDDLES_S[middle]
            found = program.own.longer(away_s, self.returns.longer(program.tool, away_s))
            if (max(found, SLOWER) if away_s < SLOWER_S else found) > share:
                low = middle + 1
            else:
                high = middle
        return MIDDLES_S[low]

    def _look_again(self, now_s: float) -> None:
        """Whether some of those that are away do not come back: in turns, so that all are seen."""
        if not self._learns:
            return
        for name in [*islice(self._programs, LOOK_AHEAD)]:
            program = self._programs[name]
            self._programs.move_to_end(name)
            if not program.calls and program.turns and not program.gone and now_s >= program.gone_s:
                program.gone = True
                self.returns.gone(program.turn(), program.tool)

    def _forget_one(self) -> None:
        for name in [*islice(self._programs, FORGET_AHEAD)]:
            program = self._programs[name]
            if not program.calls and not self._needed(name):
                del self._programs[name]
                return
            # Others may have to go before it is looked at again.
            self._programs.move_to_end(name)

    def _needed(self, name: str) -> bool:
        """Whether a program must be remembered although it has no call."""
        return False

    def _wait_s(self, program: Kind) -> float:
        """How long it is expected to stay away still: who is overdue, for as long again. Longer where it may not come back."""
        left = abs(program.due_s - self._now_s)
        return left / max(program.likely, 0.01)
