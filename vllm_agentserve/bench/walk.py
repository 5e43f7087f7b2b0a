"""Which calls are due when a call has ended; replays over HTTP, engines in this process and the simulator ask it."""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class PlannedCall(Generic[Name]):
    """A call and what it waits for.

    Args:
        after: calls that must be over before it; empty for one that is due from the beginning.
        delay_s: seconds from the end of the last of them, or from the beginning, to this call.
        origin: the call whose prompt and answer this one's prompt begins with; None for a new prompt. One of `after`, or over
            before one of them begins.
    """

    after: tuple[Name, ...] = ()
    delay_s: float = 0.0
    origin: Name | None = None
    at_s: float = 0.0


@dataclass(frozen=True)
class DueCall(Generic[Name]):
    """A call that nothing has to end for any more, and when it is to be sent, in seconds of the clock of the caller."""

    name: Name
    at_s: float


class Walk(Generic[Name]):
    """Calls that wait for each other, on their way. It has no clock: who runs the calls says when they ended.

    Args:
        calls: all calls by name; of those that are due together, the first come first.
    """

    def __init__(self, calls: Mapping[Name, PlannedCall[Name]]) -> None:
        self._calls = calls
        self._missing = {name: len(set(call.after)) for name, call in calls.items()}
        self._followers: dict[Name, list[Name]] = {name: [] for name in calls}
        self._continued: dict[Name, list[Name]] = {name: [] for name in calls}
        for name, call in calls.items():
            for before in dict.fromkeys(call.after):
                self._followers[before].append(name)
            if call.origin is not None:
                self._continued[call.origin].append(name)
        self._began_s = 0.0
        self._given_up: set[Name] = set()
        self._over: set[Name] = set()

    @property
    def over(self) -> bool:
        """Whether every call has ended, or was given up."""
        return len(self._over) == len(self._calls)

    def begin(self, now_s: float) -> list[DueCall[Name]]:
        """The calls that wait for no other one."""
        self._began_s = now_s
        return [self._due(name, now_s) for name, call in self._calls.items() if not call.after]

    def end(self, name: Name, now_s: float) -> list[DueCall[Name]]:
        """A call has ended well. Returns the calls that waited for it last."""
        over, due = [name], []
        for one in over:
            self._over.add(one)
            for follower in self._followers[one]:
                self._missing[follower] -= 1
                if self._missing[follower]:
                    continue
                if follower in self._given_up:
                    over.append(follower)
                else:
                    due.append(self._due(follower, now_s))
        return due

    def _due(self, name: Name, now_s: float) -> DueCall[Name]:
        """A call whose last wait is over now."""
        call = self._calls[name]
        return DueCall(name, max(now_s + call.delay_s, self._began_s + call.at_s))

    def fail(self, name: Name, now_s: float) -> list[DueCall[Name]]:
        """A call has failed: those that go on from its context are given up, the others go on.

        A call that is given up is never due. It is over as soon as all that it waits for is over, so that what follows it does
        not begin earlier than it would have without the failure.
        """
        lost = [name]
        for one in lost:
            lost += self._continued[one]
        self._given_up.update(lost)
        return self.end(name, now_s)

    def in_order(self) -> Iterator[tuple[Name, PlannedCall[Name]]]:
        """Every call after those it waits for, if none takes any time; uses the walk up."""
        waiting = self.begin(0.0)
        for due in waiting:
            yield due.name, self._calls[due.name]
            waiting += self.end(due.name, 0.0)
