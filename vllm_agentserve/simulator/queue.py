"""The waiting calls of the simulator, in the order the scheduler's queue would give them."""

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Generic, TypeVar

from vllm_agentserve.policy.order import DECIDE_STEPS, LOOK_AHEAD, AdmissionKey, Patience, Urgency, ahead
from vllm_agentserve.policy.target import Backlog

Item = TypeVar("Item")


class SimulatedQueue(Generic[Item]):
    """Waiting calls in admission order; steps pass in bulk.

    Args:
        key_of: gives the sort key of a call; asked when it comes in and when it is looked at again.
        patience: steps a call may be overtaken before it moves to the front; None for no bound.
        relevels: whether keys change while calls wait.
    """

    def __init__(self, key_of: Callable[[Item], AdmissionKey], patience: int | None, relevels: bool) -> None:
        self._key_of = key_of
        self._patience = None if patience is None else Patience(patience)
        self._relevels = relevels
        self._order: list[tuple[AdmissionKey, int, str]] = []
        self._resumes: list[tuple[AdmissionKey, int, str]] = []
        self._places: dict[str, tuple[AdmissionKey, int, Item]] = {}
        self._came: dict[str, float] = {}
        self._tokens, self._came_s = 0, 0.0
        self.colds_wait = False
        """Set while no further cold prefill can begin: then only resume prefills are offered."""
        self._numbers = 0
        self._turn = 0
        self._step = 0
        self.overdue = 0
        """Calls that were overtaken for too long."""

    def __len__(self) -> int:
        return len(self._order)

    def add(self, name: str, item: Item, now_s: float) -> None:
        self._came[name] = now_s
        self._insert(name, self._numbers, item, self._key_of(item))
        self._numbers += 1
        if self._patience is not None:
            self._patience.enter(name, self._step)

    def pop(self) -> Item:
        """Takes out whom `first()` shows."""
        name = self._line()[0][2]
        item = self._take(name)[2]
        del self._came[name]
        return item

    def first(self) -> Item | None:
        """Who is offered next; None if nobody is."""
        line = self._line()
        return self._places[line[0][2]][2] if line else None

    def _line(self) -> list[tuple[AdmissionKey, int, str]]:
        return self._resumes if self.colds_wait else self._order

    def has_cold(self) -> bool:
        return len(self._resumes) < len(self._order)

    def waiting_resume_tokens(self, limit: int) -> int:
        """Uncached tokens of the resume prefills that `limit` free places can take; a cold prefill before them takes one."""
        limit = max(min(limit, LOOK_AHEAD), 0)
        cold_first = any(key.cold for key, _, _ in self._line()[:limit])
        return sum(key.uncached for key, _, _ in self._resumes[: limit - cold_first])

    def backlog(self, now_s: float) -> Backlog:
        prompts = len(self._order)
        return Backlog(prompts, self._tokens, 1000 * (now_s - self._came_s / prompts) if prompts else 0.0)

    def passed(self, steps: int) -> None:
        """So many steps were run."""
        decisions = (self._step + steps) // DECIDE_STEPS - self._step // DECIDE_STEPS
        self._step += steps
        if self._patience is not None:
            for name in self._patience.overdue(self._step):
                if name in self._places:
                    key, number, item = self._take(name)
                    self._insert(name, number, item, ahead(key, Urgency.OVERDUE, number))
                    self.overdue += 1
        if self._relevels:
            # More often than once around changes nothing.
            for _ in range(min(decisions, len(self._order) // LOOK_AHEAD + 1)):
                self._look_again()

    def _look_again(self) -> None:
        if self._turn >= len(self._order):
            self._turn = 0
        names = [name for _, _, name in self._order[self._turn : self._turn + LOOK_AHEAD]]
        self._turn += LOOK_AHEAD
        for name in names:
            key, number, item = self._take(name)
            self._insert(name, number, item, self._key_of(item) if key.urgency == Urgency.NORMAL else key)

    def _insert(self, name: str, number: int, item: Item, key: AdmissionKey) -> None:
        self._places[name] = key, number, item
        for line in (self._order,) if key.cold else (self._order, self._resumes):
            insort(line, (key, number, name))
        self._tokens += key.tokens
        self._came_s += self._came[name]

    def _take(self, name: str) -> tuple[AdmissionKey, int, Item]:
        key, number, item = self._places.pop(name)
        for line in (self._order,) if key.cold else (self._order, self._resumes):
            del line[bisect_left(line, (key, number, name))]
        self._tokens -= key.tokens
        self._came_s -= self._came[name]
        return key, number, item
