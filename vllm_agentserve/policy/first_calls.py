"""First calls that wait: which of them are held, which let others begin before them, and how many came together."""

from collections import deque
from collections.abc import Iterator, Mapping
from math import inf

from vllm_agentserve.policy.claims import LoadCall, Program

SETTLE_S, BURST = 0.3, 0.5
"""Programs that come together are decided on together: the first that might not fit waits so long for the others, while this
share of all programs came within that time."""
QUEUED, WAIT_S, WAIT_READS = 4, 1.0, 2.0
"""Where so many calls that may begin still wait for the engine, it is not decided yet whether another one may that might not fit:
it would wait anyway, and more is known later. But not where none of them was scheduled for so long, or for so many times as its
own prompt takes to read if that is longer: something else keeps them."""


class Burst:
    """How many first calls came just now."""

    def __init__(self) -> None:
        self._came_s: deque[float] = deque()
        """When those came that came within `SETTLE_S`."""

    def comes(self, now_s: float) -> None:
        self.size(now_s)
        self._came_s.append(now_s)

    def size(self, now_s: float) -> int:
        while self._came_s and now_s - self._came_s[0] > SETTLE_S:
            self._came_s.popleft()
        return len(self._came_s)


class FirstCalls:
    """Those that may not begin yet, or were not asked for, as they came.

    After a no, asking again is of no use until something happens or some time is over. There are two such times: for calls
    that want most of the limit, and for the others, which may begin before them.
    """

    def __init__(self) -> None:
        self.waiting: dict[LoadCall, None] = {}
        self.queued: dict[LoadCall, None] = {}
        """First calls that may begin, wait for the engine only, and are not scheduled yet."""
        self._queued_batch = 0
        """How many of them are of class batch."""
        self._began_s = -inf
        """When one of those was scheduled last."""
        self.held = 0
        """How many of them are held."""
        self.passed = 0
        """How many of these let others begin before them."""
        self._closed_until_s = self._large_closed_until_s = -inf
        """For those that others do not pass, and for those that they do."""
        self._beyond: dict[bool, int] = {}
        self._beyond_until_s = -inf
        """Prompt tokens of the smallest call that went beyond what sub-agents may take, named or not; until when that holds."""

    def __len__(self) -> int:
        return len(self.waiting)

    def remove(self, call: LoadCall) -> bool:
        """A call waits no more; returns whether it did."""
        if call not in self.waiting:
            return False
        del self.waiting[call]
        self.held -= call.held
        self.passed -= call.passed
        call.held = call.passed = False
        return True

    def hold(self, call: LoadCall) -> None:
        self.held += not call.held
        call.held = True

    def lets_pass(self, call: LoadCall, others: bool) -> None:
        """Whether others may begin before this call."""
        self.passed += others - call.passed
        call.passed = others

    def may_begin(self, call: LoadCall) -> None:
        """A first call may begin, and waits to be scheduled."""
        if call not in self.queued:
            self.queued[call] = None
            self._queued_batch += call.batch

    def began(self, call: LoadCall, now_s: float) -> None:
        """A call was scheduled."""
        if self.leaves(call):
            self._began_s = now_s

    def leaves(self, call: LoadCall) -> bool:
        """A call does not wait to be scheduled; returns whether it was one that may begin."""
        if call not in self.queued:
            return False
        del self.queued[call]
        self._queued_batch -= call.batch
        self.open()
        return True

    def would_wait(self, call: LoadCall, now_s: float, read_s: float) -> bool:
        """Whether a call would wait for others if it might begin now; `read_s`: what its prompt takes to read."""
        before = len(self.queued) if call.batch else len(self.queued) - self._queued_batch
        if call.ahead or before < QUEUED:
            return False
        return now_s - max(call.came_s, self._began_s) < max(WAIT_S, WAIT_READS * read_s)

    @property
    def in_order(self) -> int:
        """How many are held that others do not pass."""
        return self.held - self.passed

    @property
    def ask_again_s(self) -> float:
        """Before that asking is of no use for any of them; -inf for now."""
        return self._closed_until_s if self.in_order > 0 else self._large_closed_until_s

    def closed(self, call: LoadCall, now_s: float) -> bool:
        """Whether asking for this call is of no use yet, or others are before it."""
        if call.passed:
            return now_s < self._large_closed_until_s
        return now_s < self._closed_until_s or (self.in_order > 0 and not call.held)

    def close(self, until_s: float, large: bool = False) -> None:
        """A call may not begin, nor may another before that time unless something happens."""
        if large:
            self._large_closed_until_s = until_s
        else:
            self._closed_until_s = until_s

    def goes_beyond(self, call: LoadCall, now_s: float) -> bool:
        """Whether a sub-agent's call wants no less than one that wanted too much just now."""
        return now_s < self._beyond_until_s and call.prompt_tokens >= self._beyond.get(call.program.named, inf)

    def went_beyond(self, call: LoadCall, now_s: float, until_s: float) -> None:
        """A sub-agent's call wants too much, as do all that want no less before that time unless something happens."""
        if now_s >= self._beyond_until_s:
            self._beyond, self._beyond_until_s = {}, until_s
        named = call.program.named
        self._beyond[named] = min(call.prompt_tokens, self._beyond.get(named, call.prompt_tokens))

    def open(self) -> None:
        """Something has happened: those that are held may be asked for again."""
        self._closed_until_s = self._large_closed_until_s = self._beyond_until_s = -inf

    def faults(self, live: Mapping[str, Program]) -> Iterator[str]:
        """What does not agree, `live` being the programs there are."""
        batch = sum(call.batch for call in self.queued)
        if batch != self._queued_batch:
            yield f"{self._queued_batch} calls of class batch are said to wait for the engine, and {batch} do"
        for call in self.queued:
            if call.over or call.begun:
                yield f"a first call of {call.program.name!r} that may begin is no longer waiting"
        for call in self.waiting:
            if call.over or live.get(call.program.name) is not call.program:
                yield f"a first call of {call.program.name!r} is gone"
        held = sum(call.held for call in self.waiting)
        if held != self.held:
            yield f"{self.held} calls are said to be held, and {held} are"
        if sum(call.held and call.passed for call in self.waiting) != self.passed:
            yield f"{self.passed} calls are said to let others pass, and that many do not"
