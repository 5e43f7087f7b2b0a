"""The waiting queue by itself: calls are made for the requests that come, and parked and put back by name."""

from collections.abc import Callable, Container, Hashable, Mapping
from typing import Any

from vllm.v1.request import Request

from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.order import AdmissionKey
from vllm_agentserve.policy.waiting import WaitingList, lane_takes
from vllm_agentserve.scheduler.waiting import AgentQueue


class LoneQueue(AgentQueue):
    """A queue without a scheduler.

    Args:
        key_of: gives the key of a request with its number of arrival.
        patience: steps a request may be overtaken.
        clock: in seconds.
    """

    def __init__(
        self,
        key_of: Callable[[Request, int], AdmissionKey],
        patience: int,
        clock: Callable[[], float] = float,
    ) -> None:
        self.calls: dict[str, Call] = {}
        self.list = WaitingList(lambda call: key_of(call.request, call.number), patience, clock=clock)
        super().__init__(self.list, self.calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.list, name)

    @property
    def step(self) -> int:
        return self.list.step

    @step.setter
    def step(self, step: int) -> None:
        self.list.step = step

    def add_request(self, request: Request) -> None:
        self.calls.setdefault(request.request_id, Call(request))
        super().add_request(request)

    def forget(self, name: str) -> None:
        self.list.forget(self.calls.pop(name))

    def park(self, held: Mapping[str, Hashable | None]) -> None:
        park(self.list, self.calls, held)

    def release(self, room: int | None, filling: Container[Hashable]) -> None:
        self.list.release(lane_takes(room, filling))


def park(waiting: Any, calls: Mapping[str, Call], held: Mapping[str, Hashable | None]) -> None:
    """Puts those aside that are known, by name, with what each waits for."""
    waiting.park({calls[name]: awaited for name, awaited in held.items() if name in calls})
