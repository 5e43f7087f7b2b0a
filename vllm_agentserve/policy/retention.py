"""Retention: whose KV blocks stay in the pool after a call has ended, until the program comes back.

With an LRU order and contexts of more than the pool, the blocks that are handed out are those that are needed next: nobody
finds anything. Here some programs are kept whole and the others not at all, so that a share of all turns finds everything. Who is
kept stays kept from call to call, as long as its context fits. Kept blocks are handed out only when nothing else is left.

- A call that found less than half of its context waits while others run and only kept blocks of other programs are left: what it
  would push out is needed before it ends. Others go before it meanwhile. It does not wait for longer than 64 steps (of
  class batch: `max_bypass_steps`), and not at all if it had a place before.
- A program is kept when it is likely to come back, and when its blocks fit beside those of the others that are kept.
- It takes the room of others only if these are expected back much later than it.
- When kept programs outgrow the room, the one that was kept last goes.
- It is kept as long as it is likely to come back still, with some grace, and not after a call that its client calls the last.

Everything is said with the time at which it happened, in seconds of any clock. After Continuum (arXiv 2511.02230), whose time to
live this is without holding blocks that a request needs.
"""

from collections import OrderedDict
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass, field
from itertools import islice
from math import inf

from vllm_agentserve.policy.claims import LAPSE, SLOWER, SLOWER_S, TURNS_APART
from vllm_agentserve.policy.gaps import MIDDLES_S, OwnGaps, Returns, Turn

SHARE = 0.75
"""Of the pool, what kept programs may have, those that run included: the others need room as well."""
LEAST = 0.5
"""Programs that are less likely to come back are not kept, at the end of a call or later on."""
SOONER = 2.0
"""A program takes the room of those that are expected back after so many times as long."""
GRACE = 1.25
"""Kept so many times as long as that takes, or as all but `LAPSE` of the gaps are."""
LOOK_AHEAD = 4
"""Programs that are away and looked at again whenever a call comes."""
PROGRAMS_KEPT = 65_536
"""Programs remembered, the longest unseen are forgotten first."""


@dataclass(slots=True, eq=False)
class Program:
    """A program as retention sees it.

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
        blocks: its own KV blocks while it is kept, shared ones only if no other pays for them; else 0.
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
    blocks: int = 0
    likely: float = 0.0
    own: OwnGaps = field(default_factory=OwnGaps)

    def turn(self) -> Turn:
        return self.named, min(max(self.turns, 1), TURNS_APART)


class Retention:
    """Says which programs are kept. It counts blocks, and knows none.

    Args:
        pool_blocks: size of the KV cache.
        returns: when and whether programs come back, where somebody else learns it; it is learned here otherwise.
        share: of the pool, what may be kept.
    """

    def __init__(self, pool_blocks: int, returns: Returns | None = None, share: float = SHARE) -> None:
        self.room = int(pool_blocks * share)
        self._learns = returns is None
        self.returns = Returns() if returns is None else returns
        self._programs: OrderedDict[str, Program] = OrderedDict()
        """All that are remembered, the longest unseen first."""
        self._kept: dict[str, Program] = {}
        """Those that are kept, the first to be kept first; also while their calls run."""
        self.blocks = 0
        """Blocks of those that are kept."""
        self._now_s = 0.0
        self._next_s = inf
        """No kept program is over its time before this."""

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    # Events. Those that let programs go return their names.

    def arrive(self, name: str, now_s: float, *, named: bool = True) -> None:
        """A call of the program came."""
        self._now_s = now_s
        program = self._programs.get(name)
        if program is None:
            program = self._programs[name] = Program(name, named)
            if len(self._programs) > PROGRAMS_KEPT:
                self._forget_one()
        elif not program.calls and program.turns:
            gap = now_s - program.ended_s
            program.own.add(gap)
            if self._learns:
                self.returns.returned(program.turn(), program.tool, gap, revised=program.gone)
            program.gone = False
        self._programs.move_to_end(name)
        program.calls += 1

    def end(
        self,
        name: str,
        now_s: float,
        blocks: int,
        *,
        last: bool = False,
        tool: str | None = None,
        can_return: bool = True,
    ) -> tuple[bool, list[str]]:
        """A call of the program ended; whether its blocks are kept, and who is not kept any more.

        Args:
            blocks: of its context, that no kept program before it has.
            last: whether its client says that the program ends with it.
            tool: what it does until it comes back, where that was said.
            can_return: whether a later call can go on from this one.
        """
        gone = self.expire(now_s)
        program = self._programs.get(name)
        if program is None:
            return False, gone
        program.calls = max(program.calls - 1, 0)
        program.turns += 1
        program.ended_s, program.tool = now_s, tool
        self._expect(program, now_s, last or not can_return)
        if last and self._learns:
            self.returns.gone(program.turn(), tool)
            program.gone = True
        if program.likely < LEAST:
            # Who is not kept any more because of this call is not among those that are to be let go: it is that program itself.
            self._leave(program)
            return False, gone
        others = self._make_room(program, blocks)
        if others is None:
            self._leave(program)
            return False, gone
        for other in others:
            self._leave(other)
        self.blocks += blocks - program.blocks
        program.blocks = blocks
        self._kept[name] = program
        self._next_s = min(self._next_s, program.gone_s)
        return True, gone + [other.name for other in others]

    def abort(self, name: str, now_s: float) -> None:
        """A call ended without an answer. The program stays as it is, and its time begins again."""
        self._now_s = now_s
        program = self._programs.get(name)
        if program is None:
            return
        program.calls = max(program.calls - 1, 0)
        if not program.calls:
            program.ended_s = now_s
            self._expect(program, now_s, over=False)
            if name in self._kept:
                self._next_s = min(self._next_s, program.gone_s)

    def _expect(self, program: Program, now_s: float, over: bool) -> None:
        """When it is expected back, if at all."""
        self._now_s = now_s
        likely = 0.0 if over else self.returns.probability(program.turn(), program.tool)
        # Among prompts that nobody ever went on from, the first of a program is taken for one of them.
        program.likely = min(likely, self.returns.begins(program.named)) if program.turns == 1 else likely
        program.due_s = now_s + self._within(program, 0.5)
        # Of those that are still away when this share of the gaps is longer, as many come back as do not, if `LEAST` is a half.
        odds = LEAST / (1 - LEAST) * (1 - program.likely) / max(program.likely, LEAST)
        program.gone_s = now_s + GRACE * self._within(program, max(LAPSE, min(odds, LEAST)))

    def _within(self, program: Program, share: float) -> float:
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

    def expire(self, now_s: float) -> list[str]:
        """Lets those go that have been away for longer than programs are."""
        self._now_s = now_s
        self._look_again(now_s)
        if now_s < self._next_s:
            return []
        gone = [program for program in self._kept.values() if not program.calls and now_s >= program.gone_s]
        for program in gone:
            self._leave(program)
        self._next_s = min((one.gone_s for one in self._kept.values() if not one.calls), default=inf)
        return [program.name for program in gone]

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
        for name, program in self._programs.items():
            if not program.calls and name not in self._kept:
                del self._programs[name]
                return

    # Room.

    def _make_room(self, program: Program, blocks: int) -> list[Program] | None:
        """Who has to go so that the program fits; None if it is not to be kept."""
        missing = self.blocks - program.blocks + blocks - self.room
        if missing <= 0:
            return []
        if blocks > self.room:
            return None
        wait_s = self._wait_s(program)
        kept = program.name in self._kept
        leaving = []
        for other in self._latest_first():
            # Those that wait or run now, and those that were kept before it, stay, unless they come back much later.
            if other is program:
                kept = False
                continue
            if other.calls or not (kept or self._wait_s(other) > SOONER * wait_s):
                continue
            leaving.append(other)
            missing -= other.blocks
            if missing <= 0:
                return leaving
        return None

    def _latest_first(self) -> Iterator[Program]:
        return reversed(self._kept.values())

    def _wait_s(self, program: Program) -> float:
        """How long it is expected to stay away still: who is overdue, for as long again. Longer where it may not come back."""
        left = abs(program.due_s - self._now_s)
        return left / max(program.likely, 0.01)

    def _leave(self, program: Program) -> None:
        if self._kept.pop(program.name, None) is not None:
            self.blocks -= program.blocks
            program.blocks = 0

    def release(self, name: str) -> None:
        """The program is not kept any more: its blocks are gone, or the cache was emptied."""
        if name in self._kept:
            self._leave(self._kept[name])

    def resize(self, name: str, blocks: int) -> None:
        """A kept program has so many blocks more of its own: it lost some, or those it shared are its own now."""
        program = self._kept.get(name)
        if program is not None:
            more = max(blocks, -program.blocks)
            program.blocks += more
            self.blocks += more

    def away_blocks(self, running: Container[str], but: str | None) -> int:
        """Blocks of kept programs that are free, but for one program: those that do not run have none in use."""
        return sum(program.blocks for name, program in self._kept.items() if name not in running and name != but)

    def first_out(self, names: Collection[str]) -> str:
        """Whose blocks go first when nothing else is left: those of the one that is expected back last, none of which waits."""

        def rank(name: str) -> tuple[bool, float]:
            program = self._kept.get(name)
            if program is None:
                return True, inf
            return not program.calls, self._wait_s(program)

        return max(names, key=rank)

    # What is seen.

    def faults(self) -> list[str]:
        """What does not agree."""
        found = []
        counted = sum(program.blocks for program in self._kept.values())
        if counted != self.blocks:
            found.append(f"{self.blocks} KV blocks are said to be kept, and programs have {counted}")
        for name, program in self._kept.items():
            if self._programs.get(name) is not program:
                found.append(f"the program {name!r} is kept, and not remembered")
        return found
