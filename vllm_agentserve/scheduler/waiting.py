"""The waiting queue: vLLM's `RequestQueue` interface over the waiting list of `policy/waiting.py`."""

from collections.abc import Iterable, Iterator, Mapping

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.order import AdmissionKey
from vllm_agentserve.policy.waiting import WaitingList


class AgentQueue(RequestQueue):
    """Waiting requests in admission order.

    Args:
        waiting: the calls that wait.
        calls: of all requests there are, by id.
    """

    def __init__(self, waiting: WaitingList, calls: Mapping[str, Call]) -> None:
        self._waiting = waiting
        self._offered, self._parked = waiting.lists
        self._calls = calls

    def add_request(self, request: Request) -> None:
        self._add(request)

    def _add(self, request: Request, passed_over: bool = False) -> None:
        call = self._calls[request.request_id]
        # vLLM 0.32 adds a streamed session twice whose last token comes after it was preempted, and takes it out again.
        if call not in self._waiting:
            self._waiting.add(call, passed_over)

    def pop_request(self) -> Request:
        return self._waiting.pop().request

    def peek_request(self) -> Request:
        call = self._waiting.first()
        if call is None:
            raise IndexError("peek from an empty queue")
        return call.request

    def prepend_request(self, request: Request) -> None:
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """At the end of a step vLLM puts back those that it took out and that cannot run."""
        for request in requests:
            self._add(request, passed_over=True)

    def remove_request(self, request: Request) -> None:
        if request not in self:
            raise ValueError(f"request {request.request_id!r} is not in the queue")
        self._waiting.remove(self._calls[request.request_id])

    def remove_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request in self:
                self.remove_request(request)

    def __contains__(self, request: object) -> bool:
        return isinstance(request, Request) and self._calls.get(request.request_id) in self._waiting

    def __bool__(self) -> bool:
        """Whether there is a request to look at; `len()` counts all that wait."""
        return bool(self._offered) and self._waiting.open

    def __len__(self) -> int:
        return len(self._offered) + len(self._parked)

    def __iter__(self) -> Iterator[Request]:
        return iter([call.request for call in self._waiting])

    def __getitem__(self, index: int) -> Request:
        return self._waiting[index].request

    def key(self, request_id: str) -> AdmissionKey:
        """By which a queued request is sorted; raises `KeyError` for others."""
        key = self._calls[request_id].key
        if key is None:
            raise KeyError(request_id)
        return key
