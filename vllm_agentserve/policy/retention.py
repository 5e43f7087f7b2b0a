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
- A critical program takes the room of any that is not, and gives its own to none of these; it is handed out after them.
- It is kept as long as it is likely to come back still, with some grace, and not after a call that its client calls the last.

Everything is said with the time at which it happened, in seconds of any clock. After Continuum (arXiv 2511.02230), whose time to
live this is without holding blocks that a request needs.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import inf

from vllm_agentserve.policy import expected_back
from vllm_agentserve.policy.expected_back import LEAST, ExpectedBack
from vllm_agentserve.policy.gaps import Returns

SHARE = 0.75
"""Of the pool, what kept programs may have, those that run included: the others need room as well."""
SOONER = 2.0
"""A program takes the room of those that are expected back after so many times as long."""


@dataclass(slots=True, eq=False)
class Program(expected_back.Program):
    """A program as retention sees it.

    Args:
        blocks: its own KV blocks while it is kept, shared ones only if no other pays for them; else 0.
        critical: whether its client says so, with its latest call.
    """

    blocks: int = 0
    critical: bool = False


class Retention(ExpectedBack[Program]):
    """Says which programs are kept. It counts blocks, and knows none.

    Args:
        pool_blocks: size of the KV cache.
        returns: when and whether programs come back, where somebody else learns it; it is learned here otherwise.
        share: of the pool, what may be kept.
        only_critical: whether only critical programs are kept; of when programs come back it learns from all.
    """

    def __init__(
        self,
        pool_blocks: int,
        returns: Returns | None = None,
        share: float = SHARE,
        only_critical: bool = False,
    ) -> None:
        super().__init__(Program, returns)
        self._only_critical = only_critical
        self.room = int(pool_blocks * share)
        self._kept: dict[str, Program] = {}
        """Those that are kept, the first to be kept first; also while their calls run."""
        self.blocks = 0
        """Blocks of those that are kept."""
        self.critical_blocks = 0
        """Those of critical programs among them."""
        self._next_s = inf
        """No kept program is over its time before this."""

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    # Events. Those that let programs go return their names.

    def arrive(self, name: str, now_s: float, *, named: bool = True, critical: bool = False) -> None:
        """A call of the program came."""
        program = self._arrives(name, now_s, named)
        if program.critical is not critical:
            program.critical = critical
            self.critical_blocks += program.blocks if critical else -program.blocks

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
        program = self._ends(name, now_s, last, tool, can_return)
        if program is None:
            return False, gone
        if program.likely < LEAST or (self._only_critical and not program.critical):
            # Who is not kept any more because of this call is not among those that are to be let go: it is that program itself.
            self._leave(program)
            return False, gone
        others = self._make_room(program, blocks)
        if others is None:
            self._leave(program)
            return False, gone
        for other in others:
            self._leave(other)
        self._gets(program, blocks - program.blocks)
        self._kept[name] = program
        self._next_s = min(self._next_s, program.gone_s)
        return True, gone + [other.name for other in others]

    def abort(self, name: str, now_s: float) -> None:
        """A call ended without an answer. The program stays as it is, and its time begins again."""
        program = self._aborts(name, now_s)
        if program is not None and not program.calls and name in self._kept:
            self._next_s = min(self._next_s, program.gone_s)

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

    def _needed(self, name: str) -> bool:
        return name in self._kept

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
            if other.calls or other.critical > program.critical:
                continue
            if not (kept or other.critical < program.critical or self._wait_s(other) > SOONER * wait_s):
                continue
            leaving.append(other)
            missing -= other.blocks
            if missing <= 0:
                return leaving
        return None

    def _latest_first(self) -> Iterator[Program]:
        """Those that are not critical, then the others; each from the last one that was kept."""
        for critical in (False, True):
            yield from (program for program in reversed(self._kept.values()) if program.critical is critical)

    def _leave(self, program: Program) -> None:
        if self._kept.pop(program.name, None) is not None:
            self._gets(program, -program.blocks)

    def _gets(self, program: Program, more: int) -> None:
        """A kept program has so many blocks more."""
        program.blocks += more
        self.blocks += more
        if program.critical:
            self.critical_blocks += more

    def release(self, name: str) -> None:
        """The program is not kept any more: its blocks are gone, or the cache was emptied."""
        if name in self._kept:
            self._leave(self._kept[name])

    def resize(self, name: str, blocks: int) -> None:
        """A kept program has so many blocks more of its own: it lost some, or those it shared are its own now."""
        program = self._kept.get(name)
        if program is not None:
            self._gets(program, max(blocks, -program.blocks))

    def away_blocks(self, running: Collection[str], but: str | None, critical: bool = False) -> int:
        """Blocks of kept programs that are free, but for one program: those that do not run have none in use. O(running).

        Args:
            running: names, each once.
            critical: whether only those of critical programs count.
        """
        others = running if but is None or but in running else (*running, but)
        programs = (self._kept.get(name) for name in others)
        there = sum(program.blocks for program in programs if program is not None and program.critical >= critical)
        return (self.critical_blocks if critical else self.blocks) - there

    def first_out(self, names: Collection[str]) -> str:
        """Whose blocks go first when nothing else is left: those of the one that is expected back last, none of which waits."""

        def rank(name: str) -> tuple[bool, bool, float]:
            program = self._kept.get(name)
            if program is None:
                return True, True, inf
            return not program.critical, not program.calls, self._wait_s(program)

        return max(names, key=rank)

    # What is seen.

    def faults(self) -> list[str]:
        """What does not agree."""
        found = []
        counted = sum(program.blocks for program in self._kept.values())
        if counted != self.blocks:
            found.append(f"{self.blocks} KV blocks are said to be kept, and programs have {counted}")
        counted = sum(program.blocks for program in self._kept.values() if program.critical)
        if counted != self.critical_blocks:
            found.append(
                f"{self.critical_blocks} KV blocks are said to be kept for critical programs, and these have {counted}"
            )
        for name, program in self._kept.items():
            if self._programs.get(name) is not program:
                found.append(f"the program {name!r} is kept, and not remembered")
        return found
