"""The waiting queue: vLLM's `RequestQueue` interface over the admission order of `policy/order.py`."""

from bisect import bisect_left, insort
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping
from itertools import islice
from time import perf_counter

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

from vllm_agentserve.policy.order import AdmissionKey, Patience, Urgency, ahead
from vllm_agentserve.policy.target import Backlog
from vllm_agentserve.scheduler.line import Entry, Line, Place, queue_faults


class AgentQueue(RequestQueue):
    """Waiting requests in admission order.

    Args:
        key_of: gives the sort key of a request and its number in order of arrival; asked when the request comes in and
            when `retag()` is called.
        patience: engine steps a request may be overtaken before it moves to the front.
        batch_patience: the same for requests that nobody waits for.
        clock: seconds, by which waiting times are counted.

    Requests held back for the prefill lane are parked: they count as waiting, but nobody looks at them until what they wait
    for has happened, since a look costs a search through the prefix cache per request and step.

    While a cold prefill is being read that does not end in this step, another one cannot begin (`colds_wait`): then only resume
    prefills are offered, and a cold prompt at the front does not keep them waiting.

    A request that the scheduler takes out, skips and puts back keeps its place: its key decides, not the way it came in. One
    that ran and lost its place waits anew: the time it ran does not count as waiting, and the bound holds for every wait.
    """

    def __init__(
        self,
        key_of: Callable[[Request, int], AdmissionKey],
        patience: int,
        batch_patience: int | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._key_of = key_of
        self._patience = Patience(patience)
        self._batch_patience = Patience(batch_patience or patience)
        self._clock = clock
        self._line = Line()
        self._order = self._line.entries
        self._offered = ""
        """Whom the last look showed."""
        self._places: dict[str, Place] = {}
        self._parked: list[Entry] = []
        self._awaited: dict[str, Hashable | None] = {}
        """By parked request: the KV block that is being filled for somebody else; None: room in the lane."""
        self._arrivals = 0
        self._turn = 0
        """Where the next `relevel` begins."""
        self.closed = False
        """Set by the scheduler for the rest of a step in which nobody else can be admitted."""
        self.blocked = False
        """Whether somebody was not admitted in the last step for want of KV blocks or of places."""
        self.tried: Request | None = None
        """Who was granted tokens last in this step."""
        self.stale = ""
        """Who turned out in this step to be cold, and stands in line as a resume prefill."""
        self.colds_wait = False
        """Set by the scheduler for the rest of a step in which no further cold prefill can begin."""
        self.step = 0
        """The engine's step counter, set by the scheduler."""

    def add_request(self, request: Request) -> None:
        request_id, number = request.request_id, self._arrivals
        place = self._places.get(request_id)
        if place is None:
            place = self._places[request_id] = Place(request, number, number, self._patience, self._clock())
            if self._insert(place).batch:
                place.patience = self._batch_patience
        elif place.left == self.step:
            self._insert(place)
            return
        else:
            place.entered, place.overdue, place.has_waited, place.came = number, False, False, self._clock()
            self._insert(place)
        self._arrivals += 1
        place.patience.enter(request_id, self.step)

    def pop_request(self) -> Request:
        # vLLM takes out whom it has looked at, also when the line has changed since (`colds_wait`).
        if self._offered not in [line[0][2] for line in (self._order, self._line.resumes) if line]:
            self.peek_request()
        request = self._places[self._offered].request
        self.remove_request(request)
        self._offered = ""
        return request

    def peek_request(self) -> Request:
        line = self._line.offered(self.colds_wait)
        if not line:
            raise IndexError("peek from an empty queue")
        self._offered = line[0][2]
        return self._places[self._offered].request

    def prepend_request(self, request: Request) -> None:
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        if request not in self:
            raise ValueError(f"request {request.request_id!r} is not in the queue")
        place = self._places[request.request_id]
        place.left = self.step
        self._out(place)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request in self:
                self.remove_request(request)

    def __contains__(self, request: object) -> bool:
        place = self._places.get(request.request_id) if isinstance(request, Request) else None
        return place is not None and place.key is not None

    def __bool__(self) -> bool:
        """Whether there is somebody to look at; `len()` counts all who wait."""
        return bool(self._line.offered(self.colds_wait)) and not self.closed

    def __len__(self) -> int:
        return len(self._order) + len(self._parked)

    def __iter__(self) -> Iterator[Request]:
        return iter([self._places[request_id].request for _, _, request_id in (*self._order, *self._parked)])

    def __getitem__(self, index: int) -> Request:
        return self._places[self._order[index][2]].request

    def key(self, request_id: str) -> AdmissionKey:
        """By which a queued request is sorted; raises `KeyError` for others."""
        key = self._places[request_id].key
        if key is None:
            raise KeyError(request_id)
        return key

    def forget(self, request_id: str) -> None:
        """Drops what is known of a finished request; one that is still queued is taken out."""
        place = self._places.pop(request_id, None)
        if place is None:
            return
        place.patience.leave(request_id)
        if place.key is not None:
            self._out(place)

    def faults(self, known: Container[str]) -> list[str]:
        """What does not agree, `known` being the requests there are; O(n)."""
        return queue_faults(self._places, self._line, self._parked, self._awaited, known)

    @property
    def parked(self) -> int:
        return len(self._parked)

    def park(self, held: Mapping[str, Hashable | None]) -> None:
        """Puts requests aside, by id, with what each waits for; those that are not in the queue are ignored."""
        for request_id, awaited in held.items():
            place = self._places.get(request_id)
            if place is not None and place.key is not None and request_id not in self._awaited:
                self._take(place, keep_key=True)
                self._awaited[request_id] = awaited
                insort(self._parked, place.entry)
                if place.entry[0].urgency <= Urgency.OVERDUE:
                    # Its bound was up in line, or it had none there; in the park it has one.
                    place.overdue = True
                    place.patience.enter(request_id, self.step)

    def release(self, room: int | None, filling: Container[Hashable]) -> None:
        """Puts parked requests back.

        Args:
            room: how many of those that wait for room in the lane, the first ones in order; None for all.
            filling: blocks that are being filled; who waits for another one goes back.
        """
        back = []
        for _, _, request_id in self._parked:
            awaited = self._awaited[request_id]
            if awaited is not None:
                if awaited not in filling:
                    back.append(request_id)
            elif room is None:
                back.append(request_id)
            elif room > 0:
                room -= 1
                back.append(request_id)
        for request_id in back:
            place = self._places[request_id]
            self._out(place)
            self._insert(place)

    def _overdue_in_park(self, place: Place) -> None:
        """It goes first when there is room; one that still waits for room as many steps later waits for the lane no longer. One
        that waits for a block stays: it would compute what the lane is computing already."""
        request_id = place.request.request_id
        awaited = self._awaited[request_id]
        place.has_waited = place.overdue and awaited is None
        self._out(place)
        place.overdue = True
        self._insert(place)
        if not place.has_waited:
            place.patience.enter(request_id, self.step)
            self._take(place, keep_key=True)
            self._awaited[request_id] = awaited
            insort(self._parked, place.entry)

    def stepped(self, tokens_left: bool) -> None:
        """A step has been scheduled; whether it could have had more tokens."""
        refused = self.tried is not None and self.tried in self
        self.blocked, self.tried = tokens_left and (refused or bool(self)), None
        stale, self.stale = self.stale, ""
        if stale in self._places and self._places[stale].key is not None and stale not in self._awaited:
            self._rekey([stale])

    def has_waited(self, request_id: str) -> bool:
        """Whether a request has waited for room in the lane for so long that it must not wait any longer."""
        place = self._places.get(request_id)
        return place is not None and place.has_waited

    def waiting_resume_tokens(self, places: int) -> int:
        """Uncached tokens of the resume prefills that so many free places can take."""
        return self._line.waiting_resume_tokens(places, self.colds_wait)

    def has_cold(self) -> bool:
        """Whether a request waits that is not a short resume prefill."""
        return self._line.has_cold()

    @property
    def tokens(self) -> int:
        """Prompt tokens, not yet computed, of all that wait for steps."""
        return self._line.tokens

    def backlog(self) -> Backlog:
        """The prompts that wait for steps and that somebody waits for; not those that wait for the prefill lane."""
        return self._line.backlog(self._clock())

    def promote_overdue(self) -> int:
        """Moves requests that were overtaken for too long to the front; returns how many."""
        promoted = 0
        for request_id in (*self._patience.overdue(self.step), *self._batch_patience.overdue(self.step)):
            place = self._places.get(request_id)
            if place is None or place.key is None:
                continue
            if request_id in self._awaited:
                self._overdue_in_park(place)
                continue
            if place.key.urgency <= Urgency.OVERDUE:
                continue
            self._take(place)
            place.overdue = True
            self._insert(place)
            promoted += 1
        return promoted

    def retag(self, limit: int) -> None:
        """Asks again for the keys of the first `limit` cold requests: what they share may be cached by now."""
        self._rekey([request_id for _, _, request_id in islice((one for one in self._order if one[0].cold), limit)])

    def relevel(self, limit: int) -> None:
        """Asks again for the keys of `limit` requests, each time the next ones in line: levels change while they wait."""
        if self._turn >= len(self._order):
            self._turn = 0
        self._rekey([request_id for _, _, request_id in self._order[self._turn : self._turn + limit]])
        self._turn += limit

    def _rekey(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            place = self._places[request_id]
            self._take(place)
            self._insert(place)

    def _insert(self, place: Place) -> AdmissionKey:
        key = self._key_of(place.request, place.number)
        if place.overdue and key.urgency > Urgency.OVERDUE:
            key = ahead(key, Urgency.OVERDUE, place.entered)
        place.key = key
        self._line.add(place.entry, place.came)
        return key

    def _out(self, place: Place) -> None:
        """Takes a request out, parked or not."""
        request_id = place.request.request_id
        if request_id not in self._awaited:
            self._take(place)
            return
        del self._awaited[request_id]
        del self._parked[bisect_left(self._parked, place.entry)]
        place.key = None

    def _take(self, place: Place, keep_key: bool = False) -> None:
        self._line.remove(place.entry, place.came)
        if not keep_key:
            place.key = None
