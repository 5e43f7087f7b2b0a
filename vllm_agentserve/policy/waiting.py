"""The waiting calls in admission order, and what a step has to know of them together; for scheduler and simulator alike."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from math import inf

from vllm_agentserve.policy.call import Backlog, Call
from vllm_agentserve.policy.order import DECIDE_STEPS, LOOK_AHEAD, AdmissionKey, Patience, Urgency, ahead

Entry = tuple[AdmissionKey, int, Call]
"""Key and number of arrival, which differs for all, and the call."""
Counts = Callable[[AdmissionKey], bool]
"""Which of the waiting calls count."""


class Held:
    """What a call waits for that is parked until its program may begin."""


HELD = Held()


def lane_takes(room: int | None, filling: Container[Hashable]) -> Callable[[Call], bool]:
    """Which parked calls need not wait any longer for a prefill lane; asked of one after the other, in their order.

    Args:
        room: how many of those that wait for room in the lane; None for all.
        filling: hashes of the blocks it is filling; who waits for another one goes back.
    """
    left = inf if room is None else room

    def takes(call: Call) -> bool:
        nonlocal left
        if call.awaited is HELD:
            return False
        if call.awaited is not None:
            return call.awaited not in filling
        left -= 1
        return left >= 0

    return takes


def entry_of(call: Call) -> Entry:
    """The entry of a call that waits."""
    assert call.key is not None
    return call.key, call.number, call


class Line:
    """Sorted entries; those that are not cold also by themselves, so that they can be offered without the cold ones. Both again
    without those that are not ready, which nobody need look at."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.resumes: list[Entry] = []
        self._ready: list[Entry] = []
        self._ready_resumes: list[Entry] = []
        self._tokens = 0
        self._blocked = self._blocked_colds = 0
        """Calls that the engine passed over, which reserve nothing; how many of them are cold."""
        self._waited_for, self._waited_tokens, self._came_s = 0, 0, 0.0
        """Of the calls that can run and are not of class batch: how many, their tokens, and the sum of when their waits began."""

    def add(self, entry: Entry) -> None:
        for line in self._lines(entry):
            insort(line, entry)
        self._count(entry, 1)

    def remove(self, entry: Entry) -> None:
        for line in self._lines(entry):
            del line[bisect_left(line, entry)]
        self._count(entry, -1)

    def _count(self, entry: Entry, sign: int) -> None:
        key, _, call = entry
        self._tokens += sign * key.tokens
        if call.blocked:
            self._blocked += sign
            self._blocked_colds += sign * key.cold
        elif not key.batch:
            self._waited_for += sign
            self._waited_tokens += sign * key.tokens
            self._came_s = self._came_s + sign * call.wait_since_s if self._waited_for else 0.0

    def _lines(self, entry: Entry) -> tuple[list[Entry], ...]:
        if entry[2].unready:
            return (self.entries,) if entry[0].cold else (self.entries, self.resumes)
        if entry[0].cold:
            return self.entries, self._ready
        return self.entries, self.resumes, self._ready, self._ready_resumes

    def offered(self, colds_wait: bool) -> list[Entry]:
        """Who can be admitted, in order; without the cold ones while those have to wait."""
        return self._ready_resumes if colds_wait else self._ready

    def has_cold(self) -> bool:
        """Whether a cold one waits that can run."""
        return len(self.resumes) < len(self.entries) - self._blocked_colds

    @property
    def able(self) -> int:
        """How many can run."""
        return len(self.entries) - self._blocked

    def can_run(self, line: list[Entry]) -> Iterable[Entry]:
        """Those of a line that the engine did not pass over."""
        return (entry for entry in line if not entry[2].blocked) if self._blocked else line

    def waiting_resume_tokens(self, places: int, colds_wait: bool, counts: Counts = lambda key: True) -> int:
        """Uncached tokens of the resume prefills that so many free places can take. A cold prefill before them in the order takes
        one place at most: the next one waits until it has been computed."""
        offered = self.can_run(self.offered(colds_wait))
        cold_first = any(entry[0].cold for entry in islice(offered, max(places, 0)))
        resumes = islice(self.can_run(self._ready_resumes), max(places - cold_first, 0))
        return sum(key.uncached for key, _, _ in resumes if counts(key))

    @property
    def tokens(self) -> int:
        """Prompt tokens of all entries, not yet computed."""
        return self._tokens

    def backlog(self, now_s: float) -> Backlog:
        """The prompts that clients wait for, and how long they have waited on average; not those of class batch."""
        prompts = self._waited_for
        if not prompts:
            return Backlog()
        # The sum loses digits while calls come and go: who came just now would have waited for less than no time.
        waited_ms = max(1000 * (now_s - self._came_s / prompts), 0.0)
        return Backlog(prompts, self._waited_tokens, waited_ms)

    def faults(self) -> list[str]:
        """What does not agree; O(n)."""
        found = []
        if self.entries != sorted(self.entries):
            found.append("the queue is not in order")
        if self.resumes != [entry for entry in self.entries if not entry[0].cold]:
            found.append("the list of resume prefills is not that of the queue")
        for ready, every in ((self._ready, self.entries), (self._ready_resumes, self.resumes)):
            if ready != [entry for entry in every if not entry[2].unready]:
                found.append("what is offered is not what is ready of the queue")
        tokens = sum(key.tokens for key, _, _ in self.entries)
        if self._tokens != tokens:
            found.append(f"the queue counts {self._tokens} tokens that wait, and has {tokens}")
        blocked = [key.cold for key, _, call in self.entries if call.blocked]
        if (self._blocked, self._blocked_colds) != (len(blocked), sum(blocked)):
            found.append(f"the queue counts {self._blocked} requests that cannot run, and has {len(blocked)}")
        waited_for = [key.tokens for key, _, call in self.entries if not key.batch and not call.blocked]
        if (self._waited_for, self._waited_tokens) != (len(waited_for), sum(waited_for)):
            found.append(
                f"the queue counts {self._waited_for} prompts that clients wait for, and has {len(waited_for)}"
            )
        return found


class VllmOrder:
    """What a step has to know of the waiting calls where vLLM orders them itself: next to nothing.

    Also the interface of `WaitingList`, as the policy uses it.
    """

    step = 0
    """The engine's step counter."""
    blocked = False
    """Whether a call was not admitted in the last step for want of KV blocks or of places."""
    held_critical = 0
    """Critical calls that load control holds."""

    @property
    def tokens(self) -> int:
        """Prompt tokens, not yet computed, of the calls that wait for steps."""
        return 0

    def begin_step(self, step: int, relevels: bool, admits: bool = True) -> int:
        """A step is about to be scheduled; returns how many calls were found overdue.

        Args:
            step: the engine's step counter.
            relevels: whether the levels of calls change while they wait.
            admits: whether the engine admits any call; the steps in which it does not count for no bound.
        """
        return 0

    def end_step(self, tokens_left: bool) -> None:
        """A step has been scheduled; whether it could have had more tokens."""

    def reopen(self) -> None:
        """What was closed for the rest of a step is open again."""

    def hold_colds(self, but: Sequence[Call] = ()) -> None:
        """No further cold prefill can begin in this step, but these, in their order."""

    def in_order(self, limit: int) -> Iterable[Call]:
        """The first calls that can run, where their order is known."""
        return ()

    def front(self) -> Call | None:
        """The first call that can run, where their order is known."""
        return None

    def turned_away(self, call: Call) -> bool:
        """Whether the engine had no room for a call a few steps ago, although there was time for it."""
        return False

    def sort_resumes(self, resume_budget: float, limit: int) -> None:
        """A resume prefill may be so long now; those of the first `limit` calls that stand elsewhere are sorted anew."""

    def refuses(self, call: Call, cold: bool, granted: int, wanted: int) -> bool:
        """A waiting call was granted so many of the tokens it wanted; returns whether a cold prompt was granted nothing."""
        return False

    def has_cold(self, waits: bool) -> bool:
        """Whether a call waits that is not a short resume prefill; `waits`: whether any does."""
        return waits

    def waiting_resume_tokens(self, places: int, counts: Counts = lambda key: True) -> int:
        """Uncached tokens of the resume prefills that so many free places can take, of those that count."""
        return 0

    def backlog(self) -> Backlog:
        """The prompts that wait for steps and that clients wait for; not those that wait for the prefill lane."""
        return Backlog()

    def park(self, held: Mapping[Call, Hashable | None]) -> None:
        """Puts calls aside, with what each waits for; those that do not wait here are ignored."""

    @property
    def parked(self) -> int:
        """How many calls are put aside."""
        return 0

    def release(self, ready: Callable[[Call], bool]) -> None:
        """Puts those parked calls back that are `ready`, which is asked of all, in their order."""

    def let_pass(self, call: Call, pass_it: bool) -> None:
        """Whether a call waits for KV blocks that are not kept for programs: others, who may need none of these, go before it."""

    def look_in_order(self) -> None:
        """Calls that are not ready may be so now, without having been told of: they are looked at in their order."""

    def waits_anew(self, call: Call) -> None:
        """A call begins to wait that the engine does not put into this list: the next part of a streamed session."""

    def retag(self, limit: int) -> None:
        """Asks again for the keys of the first `limit` cold calls: what they share may be cached by now."""

    def forget(self, call: Call) -> None:
        """Drops what is known of a call that ends; one that still waits is taken out."""

    def faults(self, calls: Iterable[Call]) -> list[str]:
        """What does not agree, `calls` being all there are; O(n)."""
        return []


class WaitingList(VllmOrder):
    """Waiting calls in admission order.

    Args:
        key_of: gives the sort key of a call; asked when the call comes in and whenever it is looked at again.
        bypass_steps: engine steps a call may be overtaken before it moves to the front; infinite for no bound.
        batch_bypass_steps: the same for calls of class batch; None for the same.
        decide_steps: how often `relevels` does something, in steps.
        clock: seconds, by which waiting times are counted; without one nothing waits for any time.
        is_blocked: whether a call cannot run whatever the step has room for.
        when_ready: whether a call waits for something of which is told when it has ended, such as its grammar or an adapter. Then
            nobody looks at it until the function that is given was called with it, from whichever thread, or `look_in_order`.

    Calls held back for the prefill lane are parked: they count as waiting, but nobody looks at them until what they wait
    for has happened, since a look costs a search through the prefix cache per call and step.

    While a cold prefill is being computed that does not end in this step, another one cannot begin unless it is better
    (`hold_colds`): then only those and resume prefills are offered, and a cold prompt at the front does not keep them waiting.

    A call that the scheduler takes out, skips and puts back keeps its place: its key decides, not the way it came in. One
    that ran and lost its place waits anew: the time it ran does not count as waiting, and the bound holds for every wait.
    """

    def __init__(
        self,
        key_of: Callable[[Call], AdmissionKey],
        bypass_steps: float = inf,
        batch_bypass_steps: float | None = None,
        decide_steps: int = 1,
        clock: Callable[[], float] = float,
        is_blocked: Callable[[Call], bool] = lambda call: False,
        when_ready: Callable[[Call, Callable[[Call], None]], bool] = lambda call, tell: False,
    ) -> None:
        self._key_of = key_of
        self._is_blocked = is_blocked
        self._when_ready = when_ready
        self._became_ready: deque[Call] = deque()
        """Calls that may have become ready since the last step; other threads append."""
        self._looks_in_order = False
        """Whether others may have become ready that nobody has looked at since."""
        self._patience: Patience[Call] = Patience(bypass_steps)
        self._batch_patience: Patience[Call] = Patience(batch_bypass_steps or bypass_steps)
        self._decide_steps = decide_steps
        self._clock = clock
        self._line = Line()
        self._parked: list[Entry] = []
        self.held_critical = 0
        self._offered: Call | None = None
        """The call that the last look showed."""
        self._arrivals = 0
        self._closed_steps = 0
        """Steps in which the engine admitted nobody."""
        self._turn = 0
        """Where the next look at levels begins."""
        self._colds_wait = False
        self._let_begin: Sequence[Call] = ()
        """Cold prefills that are offered all the same."""
        self.closed = False
        """Whether nobody else can be admitted in this step."""
        self._tried: Call | None = None
        """The call that was granted tokens last in this step."""
        self._until_ready: dict[Call, None] = {}
        """Those that cannot run, for a reason that the engine can tell."""
        self._passed_over: dict[Call, None] = {}
        """Those that the engine passed over for another one."""
        self._looked = False
        """Whether the engine has looked at anybody since the step began."""
        self._admits = True
        """Whether the engine admits any call in this step."""
        self._turned_away: tuple[Call | None, int] = None, 0
        """The last one that was let in and was not admitted, and in which step."""
        self._stale: Call | None = None
        """A call that turned out in this step to be cold, and is sorted as a resume prefill."""

    # -- calls come and go ----------------------------------------------------------------------------------------------

    def add(self, call: Call, passed_over: bool = False) -> None:
        """Takes in a call that waits; `passed_over`: the engine took it out in this step, and it cannot run."""
        if call.number < 0:
            call.number = self._arrivals
        elif call.left_step == self.step:
            self._block(call, passed_over)
            self._insert(call)
            return
        self._wait(call)
        self._block(call, self._is_blocked(call))
        self._insert(call)
        self._enter(call)

    def _block(self, call: Call, blocked: bool) -> None:
        self._set_blocked(call, blocked)
        if blocked and self._is_blocked(call):
            self._until_ready[call] = None
            call.watched = call.watched or self._when_ready(call, self._became_ready.append)
            call.unready = call.watched
        elif blocked:
            self._passed_over[call] = None

    def _set_blocked(self, call: Call, blocked: bool) -> None:
        """Whether a call cannot run. It must not be in the line, which counts calls by this."""
        call.unready = False
        if call.blocked is blocked:
            return
        now = self._clock()
        call.blocked = blocked
        if blocked:
            call.blocked_since_s = now
        else:
            call.blocked_s += now - call.blocked_since_s
            call.wait_since_s += now - max(call.blocked_since_s, call.wait_since_s)

    def _look_again(self, limit: int) -> None:
        """Calls that wait for no grammar or adapter any more count again, although the engine has not looked at them since: while
        one long prompt takes whole steps it looks at nobody. In turns, so that all are seen. Those that it passed over for
        reasons of its own count again once it has looked at nobody for a step."""
        for _ in range(min(len(self._became_ready), limit)):
            call = self._became_ready.popleft()
            call.watched = False
            if call in self._until_ready:
                del self._until_ready[call]
                self._take_in(call, self._is_blocked(call))
        if self._looks_in_order:
            able = [call for _, _, call in self._line.entries if call.unready and not self._is_blocked(call)]
            for call in able[:limit]:
                del self._until_ready[call]
                self._take_in(call)
            self._looks_in_order = len(able) > limit
        for call in list(islice(self._until_ready, limit)):
            del self._until_ready[call]
            if self._is_blocked(call):
                self._until_ready[call] = None
            else:
                self._take_in(call)
        if not self._looked:
            for call in list(islice(self._passed_over, limit)):
                del self._passed_over[call]
                self._take_in(call)
        self._looked = False

    def _take_in(self, call: Call, blocked: bool = False) -> None:
        """A call is offered again, and counts as one that can run unless it is blocked by something else."""
        entry, unready = entry_of(call), call.unready
        self._line.remove(entry)
        self._block(call, blocked)
        if unready:
            # Meanwhile nobody has asked what its key is.
            self._insert(call)
        else:
            self._line.add(entry)

    def look_in_order(self) -> None:
        self._looks_in_order = True

    def waits_anew(self, call: Call) -> None:
        self._wait(call)
        self._enter(call)

    def _wait(self, call: Call) -> None:
        """A wait of the call begins: what it waited earlier is forgotten."""
        call.overdue = call.has_waited = call.waits_for_unkept = False
        call.wait_number, call.wait_since_s = self._arrivals, self._clock()
        self._arrivals += 1

    def _enter(self, call: Call) -> None:
        """The bound on the call's wait begins."""
        self._bound(call).enter(call, self._steps)

    def _bound(self, call: Call) -> Patience[Call]:
        return self._batch_patience if call.hints.batch else self._patience

    def first(self) -> Call | None:
        """The call that is offered next, None if there is none."""
        self._looked = True
        line = self._line.offered(self._colds_wait)
        entry = line[0] if line else None
        if self._let_begin and (begins := self._begins_next()) is not None:
            entry = begins if entry is None else min(entry, begins)
        self._offered = entry[2] if entry is not None else None
        return self._offered

    def _begins_next(self) -> Entry | None:
        """The next cold prefill that may begin although cold ones have to wait."""
        return next((entry_of(call) for call in self._let_begin if call.key is not None), None)

    def first_that_can_run(self) -> Call | None:
        """The call that is offered next of those that the engine did not pass over, None if there is none."""
        offered = self._line.can_run(self._line.offered(self._colds_wait))
        return next((call for _, _, call in offered if not self._is_blocked(call)), None)

    def pop(self) -> Call:
        """Takes out the call that `first` showed, also when the order has changed since. Raises `IndexError` without one."""
        call = self._offered
        heads = [line[0][2] for line in map(self._line.offered, (False, True)) if line]
        if call is None or call.key is None or call not in (*heads, *self._let_begin):
            call = self.first()
        if call is None:
            raise IndexError("pop from an empty queue")
        self.remove(call)
        self._offered = None
        return call

    def remove(self, call: Call) -> None:
        """Takes out a call that waits; it keeps its place if it is back in the same step."""
        call.left_step = self.step
        self._out(call)

    def forget(self, call: Call) -> None:
        self._patience.leave(call)
        self._batch_patience.leave(call)
        if call.key is not None:
            self._out(call)
        if self._offered is call:
            self._offered = None

    def __contains__(self, call: object) -> bool:
        return isinstance(call, Call) and call.key is not None

    def __len__(self) -> int:
        return len(self._line.entries) + len(self._parked)

    @property
    def lists(self) -> tuple[list[Entry], list[Entry]]:
        """The calls that are offered and those that are parked, for who counts them several times a step."""
        return self._line.entries, self._parked

    def any_can_run(self, but: Call | None = None) -> bool:
        """Whether a call is offered that can run; `but`: one that does not count."""
        counts = but is not None and but.key is not None and not (but.parked or but.blocked)
        return self._line.able > counts

    def __iter__(self) -> Iterator[Call]:
        return iter([call for _, _, call in chain(self._line.entries, self._parked)])

    def __getitem__(self, index: int) -> Call:
        return self._line.entries[index][2]

    @property
    def open(self) -> bool:
        """Whether there is a call to look at."""
        if self.closed:
            return False
        if self._line.offered(self._colds_wait):
            return True
        return self._colds_wait and (bool(self._let_begin) and self._begins_next() is not None)

    def front(self) -> Call | None:
        entry = next(iter(self._line.can_run(self._line.offered(False))), None)
        return entry[2] if entry is not None else None

    def in_order(self, limit: int) -> Iterable[Call]:
        return (call for _, _, call in islice(self._line.can_run(self._line.offered(False)), limit))

    @property
    def _steps(self) -> int:
        """The steps so far in which calls could be admitted, by which the bounds count."""
        return self.step - self._closed_steps

    @property
    def bounded(self) -> int:
        """Calls whose wait is bounded and not over."""
        return len(self._patience) + len(self._batch_patience)

    # -- parked calls ---------------------------------------------------------------------------------------------------

    @property
    def parked(self) -> int:
        return len(self._parked)

    def park(self, held: Mapping[Call, Hashable | None]) -> None:
        for call, awaited in held.items():
            if call.key is not None and not call.parked:
                self._put_aside(call, awaited)
                if call.key.urgency <= Urgency.OVERDUE:
                    # Its bound was over while it was offered, or it had none there; parked it has one.
                    call.overdue = True
                    self._enter(call)

    def _put_aside(self, call: Call, awaited: Hashable | None) -> None:
        entry = entry_of(call)
        self._line.remove(entry)
        self._set_blocked(call, False)
        self._until_ready.pop(call, None)
        self._passed_over.pop(call, None)
        call.parked, call.awaited = True, awaited
        self.held_critical += awaited is HELD and call.critical
        insort(self._parked, entry)

    def release(self, ready: Callable[[Call], bool]) -> None:
        for call in [call for _, _, call in self._parked if ready(call)]:
            if call.awaited is HELD:
                # It begins to wait for a step: long ones do not make up for the time it was held.
                self._enter(call)
                call.wait_since_s = self._clock()
            self._out(call)
            self._insert(call)

    def _overdue_while_parked(self, call: Call) -> None:
        """It goes first when there is room; one that still waits for room as many steps later waits for the lane no longer. One
        that waits for a block stays: it would compute what the lane is computing already."""
        awaited = call.awaited
        if awaited is HELD:
            # It has not begun to wait for a step; what goes before it among the held is bounded by load control.
            self._enter(call)
            return
        call.has_waited = call.overdue and awaited is None
        self._out(call)
        call.overdue = True
        self._insert(call)
        if not call.has_waited:
            self._enter(call)
            self._put_aside(call, awaited)

    # -- steps ----------------------------------------------------------------------------------------------------------

    def begin_step(self, step: int, relevels: bool, admits: bool = True) -> int:
        self._closed_steps += not admits
        self.step, self._admits = step, admits
        if self._until_ready or self._passed_over or self._became_ready:
            self._look_again(LOOK_AHEAD)
        promoted = self.promote_overdue()
        if relevels and step % self._decide_steps == 0:
            self.relevel(LOOK_AHEAD)
        return promoted

    def promote_overdue(self) -> int:
        """Moves calls that were overtaken for too long to the front; returns how many."""
        promoted = 0
        for call in (*self._patience.overdue(self._steps), *self._batch_patience.overdue(self._steps)):
            if call.key is None:
                # One whose prompt is being computed, or will be with the KV that it has, goes on before all that came later.
                call.overdue = True
                continue
            if self._is_blocked(call):
                # Nobody has overtaken it: it could not have run.
                self._enter(call)
                continue
            if call.parked:
                self._overdue_while_parked(call)
            elif call.key.urgency > Urgency.OVERDUE:
                call.overdue = True
                self._rekey([call])
                promoted += 1
            else:
                # It goes first where it waits. So it does once its prompt is being computed.
                call.overdue = True
        return promoted

    def hold_colds(self, but: Sequence[Call] = ()) -> None:
        self._colds_wait, self._let_begin = True, but

    def turned_away(self, call: Call) -> bool:
        last, step = self._turned_away
        return call is last and self.step < step + DECIDE_STEPS

    def refuses(self, call: Call, cold: bool, granted: int, wanted: int) -> bool:
        self._tried = call if granted else None
        if cold and not granted and call.key is not None and not call.key.cold:
            # What it had cached when it came is gone.
            self._stale = call
        if cold and granted < wanted:
            # It is still to be taken out itself, if it is let in.
            self._colds_wait, self._let_begin = True, (call,) if call in self._let_begin else ()
        # Nothing is left for those behind it, whom vLLM 0.33 would ask for one by one.
        self.closed = not granted or not self.open
        return cold and not granted

    def end_step(self, tokens_left: bool) -> None:
        refused = self._tried is not None and self._tried.key is not None
        if refused:
            self._turned_away = self._tried, self.step
        elif tokens_left and not self.closed and self._let_begin and self._let_begin[0].key is not None:
            # The engine did not even ask for its tokens: it has no room for its images, or took places away in this step.
            self._turned_away = self._let_begin[0], self.step
        self.blocked = tokens_left and self._admits and (refused or self._leaves_any())
        self._tried = None
        stale, self._stale = self._stale, None
        if stale is not None and stale.key is not None and not stale.parked:
            self._rekey([stale])

    def _leaves_any(self) -> bool:
        """Whether a call is still offered that can run."""
        if self.closed:
            return False
        offered = self._line.can_run(self._line.offered(self._colds_wait))
        return any(True for _ in offered) or any(call.key is not None and not call.blocked for call in self._let_begin)

    def reopen(self) -> None:
        self.closed = self._colds_wait = False
        self._let_begin = ()

    def let_pass(self, call: Call, pass_it: bool) -> None:
        if call.key is not None and not call.parked and call.waits_for_unkept is not pass_it:
            call.waits_for_unkept = pass_it
            self._rekey([call])

    def sort_resumes(self, resume_budget: float, limit: int) -> None:
        first = list(islice(self._line.offered(False), limit))
        self._rekey([call for key, _, call in first if call.found_resume and key.cold is (key.tokens <= resume_budget)])

    def retag(self, limit: int) -> None:
        self._rekey([call for _, _, call in islice((one for one in self._line.offered(False) if one[0].cold), limit)])

    def relevel(self, limit: int) -> None:
        """Asks again for the keys of `limit` calls, each time the next ones in order: levels change while they wait."""
        if self._turn >= len(self._line.entries):
            self._turn = 0
        self._rekey([call for _, _, call in self._line.entries[self._turn : self._turn + limit]])
        self._turn += limit

    # -- what a step has to know ----------------------------------------------------------------------------------------

    def has_cold(self, waits: bool) -> bool:
        return self._line.has_cold()

    def waiting_resume_tokens(self, places: int, counts: Counts = lambda key: True) -> int:
        return self._line.waiting_resume_tokens(min(places, LOOK_AHEAD), self._colds_wait, counts)

    @property
    def tokens(self) -> int:
        return self._line.tokens

    def backlog(self) -> Backlog:
        return self._line.backlog(self._clock())

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _rekey(self, calls: Iterable[Call]) -> None:
        for call in calls:
            self._line.remove(entry_of(call))
            self._insert(call)

    def _insert(self, call: Call) -> None:
        key = self._key_of(call)
        if call.overdue and key.urgency > Urgency.OVERDUE:
            key = ahead(key, Urgency.OVERDUE, call.wait_number)
        elif call.waits_for_unkept and key.urgency is Urgency.NORMAL:
            key = key._replace(urgency=Urgency.UNKEPT)
        call.key = key
        self._line.add(entry_of(call))

    def _out(self, call: Call) -> None:
        """Takes a call out, parked or not."""
        entry = entry_of(call)
        if call.parked:
            self.held_critical -= call.awaited is HELD and call.critical
            call.parked, call.awaited = False, None
            del self._parked[bisect_left(self._parked, entry)]
        else:
            self._line.remove(entry)
        call.key = None
        self._set_blocked(call, False)
        self._until_ready.pop(call, None)
        self._passed_over.pop(call, None)

    def faults(self, calls: Iterable[Call]) -> list[str]:
        entries = [*self._line.entries, *self._parked]
        listed = {call: (key, number) for key, number, call in entries}
        found = []
        if len(listed) != len(entries):
            found.append("a request is in the queue twice")
        if self._parked != sorted(self._parked):
            found.append("the queue is not in order")
        held = sum(call.awaited is HELD and call.critical for _, _, call in self._parked)
        if held != self.held_critical:
            found.append(f"{self.held_critical} critical calls are said to be held, and {held} are")
        for call in calls:
            if listed.pop(call, None) != (None if call.key is None else (call.key, call.number)):
                found.append(f"{call.name!r} is not in the queue where its key says")
        found += [f"the queue remembers {call.name!r}, which is gone" for call in listed]
        found += [f"{call.name!r} cannot run, and counts" for call in self._until_ready if not call.blocked]
        unready = [call for _, _, call in self._line.entries if call.unready and call not in self._until_ready]
        found += [f"{call.name!r} is not ready, and nobody looks whether it is" for call in unready]
        if any(not call.parked for _, _, call in self._parked) or any(call.parked for _, _, call in self._line.entries):
            found.append("a request is parked that is not marked so, or the other way round")
        return found + self._line.faults()
