"""The waiting queue: vLLM's `RequestQueue` interface over the admission order of `policy/order.py`."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

from vllm_agentserve.policy.order import AdmissionClass, AdmissionKey, Patience

Entry = tuple[AdmissionKey, int]


class AgentQueue(RequestQueue):
    """Waiting requests in admission order.

    Args:
        key_of: gives the sort key of a request; asked when the request enters and when `retag()` is called.
        patience: steps a request may be overtaken before it is moved to the front.

    A request that the scheduler takes out, skips and puts back keeps its place: the key decides, not the way it came in.
    """

    def __init__(self, key_of: Callable[[Request], AdmissionKey], patience: int) -> None:
        self._key_of = key_of
        self._patience = Patience(patience)
        self._order: list[Entry] = []
        self._entries: dict[str, tuple[Entry, Request]] = {}
        self._by_number: dict[int, Request] = {}
        self._numbers: dict[str, int] = {}
        self._next_number = 0
        self.step = 0
        """The engine's step counter; the scheduler sets it."""

    def add_request(self, request: Request) -> None:
        self._insert(request, self._key_of(request))

    def pop_request(self) -> Request:
        request = self.peek_request()
        self._take(request.request_id)
        return request

    def peek_request(self) -> Request:
        if not self._order:
            raise IndexError("peek from an empty queue")
        return self._by_number[self._order[0][1]]

    def prepend_request(self, request: Request) -> None:
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        if request.request_id not in self._entries:
            raise ValueError(f"request {request.request_id!r} is not in the queue")
        self._take(request.request_id)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request.request_id in self._entries:
                self._take(request.request_id)

    def __bool__(self) -> bool:
        return bool(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Request]:
        return iter([self._by_number[number] for _, number in self._order])

    def keys(self, limit: int) -> list[AdmissionKey]:
        """The keys of the first `limit` requests in order."""
        return [key for key, _ in self._order[:limit]]

    def promote_overdue(self) -> int:
        """Moves requests that were overtaken for too long to the front; returns how many."""
        promoted = 0
        for request_id in self._patience.overdue(self.step):
            found = self._entries.get(request_id)
            if found is None:
                self._numbers.pop(request_id, None)
                continue
            ((kind, _, arrival), _), request = found
            if kind > AdmissionClass.OVERDUE:
                self._take(request_id)
                self._insert(request, (AdmissionClass.OVERDUE, 0, arrival))
                promoted += 1
        return promoted

    def retag(self, limit: int) -> None:
        """Asks again for the keys of the first `limit` cold requests: what they share may be cached by now."""
        first = bisect_left(self._order, ((AdmissionClass.COLD, 0, float("-inf")), 0))
        for _, number in self._order[first : first + limit]:
            request = self._by_number[number]
            self._take(request.request_id)
            self._insert(request, self._key_of(request))

    def _insert(self, request: Request, key: AdmissionKey) -> None:
        number = self._numbers.get(request.request_id)
        if number is None:
            number = self._numbers[request.request_id] = self._next_number
            self._next_number += 1
            self._patience.enter(request.request_id, self.step)
        entry = (key, number)
        insort(self._order, entry)
        self._entries[request.request_id] = (entry, request)
        self._by_number[number] = request

    def _take(self, request_id: str) -> None:
        entry, _ = self._entries.pop(request_id)
        del self._order[bisect_left(self._order, entry)]
        del self._by_number[entry[1]]
