"""Hosting: whose copies make room in host memory that is too small for all.

With the longest unused first, a host of less than what is live drops each context shortly before it is needed: programs that
come back in turns find nothing. Here whole programs go, and the others find everything.

- Those that are not expected back go first: the longest unused of them, as in vLLM. Those are programs whose client called a call
  their last, that stayed away for longer than programs do, and prompts that nobody is seen to go on from.
- Then the one that is expected back last; of a program that runs that is its usual gap from now on, and a call that waits is
  expected now.
- The end of a context goes before its beginning. Blocks that other contexts have too stay as long as one of these.
- Who makes room goes on to do so until it is gone or has a call: half a context saves half of a prompt only.

Everything is stored, also what would go next. To refuse copies of those that come back late was not better in the simulator
(`docs/results/host-simulated.md`). Without programs that come back this is vLLM's `lru`.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from math import inf

from vllm_agentserve.policy import expected_back
from vllm_agentserve.policy.expected_back import LEAST, ExpectedBack
from vllm_agentserve.policy.gaps import Returns, Share

Copy = Hashable
"""The name of a block's contents."""
BELIEVED = 0.5
"""Where a larger share of the calls that were said to be the last were not, what clients say of that does not count."""
PARTS = 65_536
"""Up to here contexts are remembered whole, however much of them is part of others too."""


@dataclass(slots=True, eq=False)
class Program(expected_back.Program):
    """A program as hosting sees it.

    Args:
        waiting: its calls that have not been admitted, or have lost their places.
        displaced: of these, calls that have lost their places.
        usual_s: how long it is usually away.
        said_last: whether its client said that the call that ended last is the last.
    """

    waiting: int = 0
    displaced: int = 0
    usual_s: float = 0.0
    said_last: bool = False


class Hosting(ExpectedBack[Program]):
    """Orders the copies that host memory keeps, by the programs whose contexts they are part of. It copies nothing.

    Args:
        returns: when and whether programs come back, where somebody else learns it; it is learned here otherwise.
    """

    def __init__(self, returns: Returns | None = None) -> None:
        super().__init__(Program, returns)
        self._contexts: dict[str, dict[Copy, int]] = {}
        """By program its copies and their places in its context, in this order."""
        self._owners: dict[Copy, set[str]] = {}
        """Of every copy the programs whose contexts it is part of."""
        self._parts = 0
        """Copies in all contexts together: one that several have counts for each of them."""
        self._thin_at = PARTS
        self._unsorted: set[str] = set()
        """Programs with a copy that came after others that have their places behind it."""
        self._first: OrderedDict[str, None] = OrderedDict()
        """Programs with copies that are not expected back, the longest unused first."""
        self._next_s = inf
        """No program that is away is over its time before this."""
        self._untrue = Share()
        """Of the calls that were said to be the last, those that were not."""
        self._leaving: str | None = None
        """The one that makes room, of those that are expected."""

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, copy: Copy) -> bool:
        return copy in self._owners

    # Calls.

    def arrive(self, name: str, now_s: float, *, named: bool = True) -> None:
        """A call of the program came, and waits."""
        program = self._arrives(name, now_s, named)
        program.waiting += 1
        if program.said_last:
            program.said_last = False
            self._untrue.revise()
        self._expect_running(program)
        if self._leaving == name:
            self._leaving = None
        self._look_again(now_s)

    def admit(self, name: str) -> None:
        """A call of the program that waited runs."""
        program = self._programs.get(name)
        if program is not None:
            program.waiting = max(program.waiting - 1, 0)
            program.displaced = min(program.displaced, program.waiting)
            self._sort_in(program)

    def waits_anew(self, name: str) -> None:
        """A call of the program that ran has lost its place, and waits: it needs at once what it has computed."""
        program = self._programs.get(name)
        if program is None:
            return
        program.waiting += 1
        program.displaced += 1
        self._sort_in(program)
        if self._leaving == name:
            self._leaving = None

    def end(
        self, name: str, now_s: float, *, last: bool = False, tool: str | None = None, can_return: bool = True
    ) -> None:
        """A call of the program that ran ended, with an answer.

        Args:
            last: whether its client says that the program ends with it.
            tool: what it does until it comes back, where that was said.
            can_return: whether a later call can go on from this one.
        """
        believed = last and self._untrue.estimate(0.0, 1.0) <= BELIEVED
        program = self._ends(name, now_s, believed, tool, can_return)
        if program is None:
            return
        if last:
            program.said_last = True
            self._untrue.add(False)
        self._sort_in(program)

    def abort(self, name: str, now_s: float, *, waited: bool) -> None:
        """A call ended without an answer; `waited`: it had not been admitted."""
        if waited:
            self.admit(name)
        program = self._aborts(name, now_s)
        if program is not None and not program.calls:
            self._sort_in(program)

    def _expect_running(self, program: Program) -> None:
        """What is expected of a program while its call waits and runs."""
        likely = self.returns.probability(program.turn(), program.tool)
        program.likely = likely if program.turns else min(likely, self.returns.begins(program.named))
        program.usual_s = self._within(program, 0.5)
        program.gone_s = inf
        self._sort_in(program)

    def _sort_in(self, program: Program) -> None:
        """Whether it is among those that go first."""
        if program.name not in self._contexts:
            return
        if self._is_expected(program):
            self._first.pop(program.name, None)
            self._next_s = min(self._next_s, program.gone_s)
        else:
            self._first[program.name] = None
            self._first.move_to_end(program.name)

    def _is_expected(self, program: Program) -> bool:
        # A call that waits needs its context whether or not the program comes back after it.
        return bool(program.waiting and (program.turns or program.displaced)) or program.likely >= LEAST

    def _expire(self, now_s: float) -> None:
        """Programs that have been away for longer than programs are go first."""
        self._now_s = now_s
        if now_s < self._next_s:
            return
        self._next_s = inf
        for name in self._contexts:
            program = self._programs.get(name)
            if program is None or program.calls or name in self._first:
                continue
            if now_s >= program.gone_s:
                self._first[name] = None
            else:
                self._next_s = min(self._next_s, program.gone_s)

    # Copies.

    def store(self, name: str, copy: Copy, place: int) -> None:
        """A copy is kept of a block of the program's context, which is at that place in it."""
        context = self._contexts.get(name)
        if context is None:
            context = self._contexts[name] = {}
            program = self._programs.get(name)
            if program is None:
                self._first[name] = None
            else:
                self._sort_in(program)
        if copy in context:
            return
        self._owners.setdefault(copy, set()).add(name)
        self._parts += 1
        if context and context[next(reversed(context))] > place:
            self._unsorted.add(name)
        context[copy] = place

    def context(self, name: str) -> Collection[Copy]:
        """The copies that are part of the program's context."""
        return self._contexts.get(name, {}).keys()

    def use(self, name: str, copies: Iterable[tuple[Copy, int]]) -> None:
        """A call of the program had these blocks, at these places: those of which there are copies are part of its context."""
        for copy, place in copies:
            if copy in self._owners:
                self.store(name, copy, place)
        if name in self._first:
            self._first.move_to_end(name)
        if self._parts > self._thin_at:
            self._thin_out()

    def _thin_out(self) -> None:
        """Programs that are not expected back leave to others what these have too, the longest unused first: of a prompt that
        everybody begins with, all programs would be remembered for as long as it is kept."""
        self._expire(self._now_s)
        for name in [*self._first]:
            if self._parts <= 2 * len(self._owners):
                break
            for copy in [*self._contexts[name]]:
                if len(self._owners[copy]) > 1:
                    self._give_up(name, copy)
        self._thin_at = max(PARTS, 2 * self._parts)

    def drop(self, copy: Copy) -> None:
        """A copy is not kept any more."""
        for name in self._owners.pop(copy, ()):
            self._leave(name, copy)

    def _give_up(self, name: str, copy: Copy) -> None:
        """The copy is not part of the program's context any more; others have it."""
        self._owners[copy].remove(name)
        self._leave(name, copy)

    def _leave(self, name: str, copy: Copy) -> None:
        context = self._contexts[name]
        del context[copy]
        self._parts -= 1
        if not context:
            del self._contexts[name]
            self._first.pop(name, None)
            self._unsorted.discard(name)
            if self._leaving == name:
                self._leaving = None

    def _in_order(self, name: str) -> dict[Copy, int]:
        """The copies of a context by their places. Those that came in another order are sorted when that matters: for each that
        comes it would take too long."""
        if name in self._unsorted:
            self._unsorted.remove(name)
            self._contexts[name] = dict(sorted(self._contexts[name].items(), key=lambda item: item[1]))
        return self._contexts[name]

    def clear(self) -> None:
        """No copy is kept any more."""
        self._contexts.clear()
        self._owners.clear()
        self._first.clear()
        self._unsorted.clear()
        self._parts, self._thin_at = 0, PARTS
        self._leaving = None

    def make_room(
        self, number: int, now_s: float, may_go: Callable[[Copy], bool], but: str | None = None
    ) -> list[Copy] | None:
        """So many copies that go now; None, and nothing changes, if there are not so many.

        Args:
            may_go: whether a copy is neither being copied nor needed by who asks.
            but: the program whose blocks need the room; its own go when nothing else is left.
        """
        self._expire(now_s)
        found: dict[Copy, None] = {}
        shared: dict[Copy, list[str]] = {}
        for name in self._order(but):
            self._take(name, number, may_go, found, shared)
            if len(found) == number:
                break
        else:
            # What is left is behind copies that must stay.
            for name in [*self._contexts]:
                for copy in reversed(self._in_order(name)):
                    if len(found) < number and copy not in found and may_go(copy):
                        found[copy] = None
        if len(found) < number:
            return None
        for copy in found:
            self.drop(copy)
        for copy, names in shared.items():
            if copy not in found:
                for name in names:
                    self._give_up(name, copy)
        return [*found]

    def _order(self, but: str | None) -> Iterator[str]:
        """The programs with copies, in the order in which they go."""
        yield from (name for name in self._first if name != but)
        # Of those that are expected, who has begun to make room goes on.
        leaving = self._leaving
        if leaving is not None and leaving not in self._first and leaving in self._contexts and leaving != but:
            yield leaving
        others = [name for name in self._contexts if name not in self._first and name not in (but, leaving)]
        ranked = [(self._away_s(name), name) for name in others]
        ranked.sort(reverse=True)
        for _, name in ranked:
            self._leaving = name
            yield name
        if but in self._contexts:
            yield but

    def _away_s(self, name: str) -> float:
        """In how long it is expected back."""
        program = self._programs[name]
        if program.waiting:
            return 0.0
        if program.calls:
            return program.usual_s / max(program.likely, 0.01)
        return self._wait_s(program)

    def _take(
        self,
        name: str,
        number: int,
        may_go: Callable[[Copy], bool],
        found: dict[Copy, None],
        shared: dict[Copy, list[str]],
    ) -> None:
        """Takes copies from the end of a context, up to the first that must stay. Those that others have too become theirs."""
        for copy in reversed(self._in_order(name)):
            if len(found) == number:
                return
            left = shared.get(copy, [])
            if len(left) + 1 < len(self._owners[copy]):
                shared.setdefault(copy, []).append(name)
            elif may_go(copy):
                found[copy] = None
            else:
                return

    # What is seen.

    def faults(self) -> list[str]:
        """What does not agree; O(copies)."""
        found = [f"{name!r} has no copies, and a context" for name, context in self._contexts.items() if not context]
        found += [f"{name!r} goes first, and has no copies" for name in self._first if name not in self._contexts]
        owners: dict[Copy, set[str]] = {}
        for name, context in self._contexts.items():
            if name not in self._unsorted and [*context.values()] != sorted(context.values()):
                found.append(f"the copies of {name!r} are not in the order of its context")
            for copy in context:
                owners.setdefault(copy, set()).add(name)
        if owners != self._owners:
            found.append("copies and the contexts that have them do not agree")
        parts = sum(map(len, self._contexts.values()))
        if parts != self._parts:
            found.append(f"contexts have {parts} copies together, and not {self._parts}")
        return found

    def _needed(self, name: str) -> bool:
        return name in self._contexts
