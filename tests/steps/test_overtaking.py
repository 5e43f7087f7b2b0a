"""Nobody is overtaken beyond the bound: the real order and queue under drawn steps, without an engine.

`Line` plays vLLM's scheduler: it asks for the first in line, skips some, and takes places away, as `Scheduler.schedule()` does.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.request import Request, RequestStatus

from tests.support.queues import park
from tests.support.schedulers import make_request
from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.policy.attribution import Attribution
from vllm_agentserve.policy.call import Call, Chunk
from vllm_agentserve.policy.controller import BudgetController, BudgetLimits
from vllm_agentserve.policy.engine import EnginePolicy
from vllm_agentserve.policy.hints import read_hints
from vllm_agentserve.policy.order import Urgency
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.program_order import ProgramOrder
from vllm_agentserve.policy.waiting import WaitingList, lane_takes
from vllm_agentserve.scheduler.features.build import program_order
from vllm_agentserve.scheduler.waiting import AgentQueue

BOUND, BATCH_BOUND = 7, 15
"""Steps a request may be overtaken in these tests, and one that nobody waits for."""
PLACES = 3
BLOCKS = ("block 1", "block 2", None)
"""What parked requests wait for; None: room in the lane."""


@dataclass(frozen=True)
class Arrival:
    session: int
    cached: bool
    batch: bool
    deadline_ms: int | None
    again: bool
    """Whether it has the name of a request that is gone, if there is one."""


@dataclass(frozen=True)
class Step:
    """What happens in a step; numbers choose among the requests there are."""

    arrivals: tuple[Arrival, ...] = ()
    yields: int | None = None
    """A running request that gives up its place to another, as `Preempter` does it."""
    evicted: int | None = None
    """A running request that vLLM preempts: it needs its KV blocks."""
    skipped: int = 0
    """The first ones in line cannot run in this step: a grammar is being compiled, or too many adapters are in use."""
    admitted: int = 0
    charged: tuple[int, float] | None = None
    ended: int | None = None
    aborted: int | None = None
    parked: int | None = None
    released: int | None = None


@dataclass
class Wait:
    """The wait of a request: its number among all waits, the step in which it is overdue, whether vLLM evicted it."""

    number: int
    due: int
    evicted: bool = False


@dataclass
class Line:
    policy: str
    step: int = 0
    waits: int = 0
    running: list[Request] = field(default_factory=list)
    requests: dict[str, Request] = field(default_factory=dict)
    waiting: dict[str, Wait] = field(default_factory=dict)
    arrived: dict[str, int] = field(default_factory=dict)
    batch: set[str] = field(default_factory=set)
    cached: dict[str, int] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = {"policy": self.policy, "program_quantum_ms": 1.0, "program_promote_ratio": 100_000.0}
        options = AgentServeConfig(**names, program_preempt_share=0.5)  # type: ignore[arg-type]
        controller, counts, self.calls = BudgetController(BudgetLimits()), Counter[str](), dict[str, Call]()
        programs, attribution = program_order(options, controller, counts), Attribution(16)  # type: ignore[arg-type]
        self.programs = programs if isinstance(programs, ProgramOrder) else None
        bounds = {"bypass_steps": BOUND, "batch_bypass_steps": BATCH_BOUND}
        self.engine_policy = EnginePolicy(self, controller, counts, perf_counter, attribution, programs, **bounds)  # type: ignore[arg-type]
        assert isinstance(self.engine_policy.waiting, WaitingList)
        self.list: WaitingList = self.engine_policy.waiting
        self.queue = AgentQueue(self.list, self.calls)

    # What the policy asks of the engine.

    def cached_tokens(self, call: Call) -> int:
        return self.cached[call.name]

    def is_blocked(self, call: Call) -> bool:
        return False

    def when_ready(self, call: Call, tell: Callable[[Call], None]) -> bool:
        return False

    def is_preempted(self, call: Call) -> bool:
        return bool(call.request.status is RequestStatus.PREEMPTED)

    # What happens.

    def run(self, step: Step) -> None:
        queue = self.queue
        for arrival in step.arrivals:
            self.arrive(arrival)
        self.list.step = self.step
        if step.released is not None:
            self.list.release(lane_takes(step.released if step.released < 3 else None, BLOCKS[: step.released % 3]))
        self.list.promote_overdue()
        if self.step % 3 == 0 and self.programs is not None:
            self.list.relevel(2)
        self.check()
        aside = self.gives_way(step.yields)
        if (evicted := self.chosen(self.running, step.evicted)) is not None:
            self.loses_its_place(evicted, evicted=True)
            self.queue.prepend_request(evicted)
        else:
            self.admit(step.skipped, step.admitted)
        if aside is not None:
            queue.add_request(aside)
        self.after(step)
        self.check()
        self.step += 1

    def arrive(self, arrival: Arrival) -> None:
        name = self.gone.pop() if arrival.again and self.gone else f"r{len(self.arrived)}"
        hints: dict[str, Any] = {"agent_class": "batch"} if arrival.batch else {}
        if arrival.deadline_ms is not None:
            hints["agent_deadline_ms"] = arrival.deadline_ms
        request = make_request(name, 64, session=f"s{arrival.session}", hints=hints)
        self.cached[name] = 48 + arrival.session if arrival.cached else 0
        call = self.calls[name] = Call(request, read_hints(hints)[0])
        if arrival.deadline_ms is not None:
            call.due = perf_counter() + arrival.deadline_ms / 1000
        self.engine_policy.arrive(call)
        self.requests[name] = request
        self.arrived[name] = self.waits
        (self.batch.add if arrival.batch else self.batch.discard)(name)
        self.waits_from_now(name)
        self.list.step = self.step
        self.queue.add_request(request)

    def waits_from_now(self, name: str, evicted: bool = False) -> None:
        self.waiting[name] = Wait(self.waits, self.step + (BATCH_BOUND if name in self.batch else BOUND), evicted)
        self.waits += 1

    def loses_its_place(self, request: Request, evicted: bool) -> None:
        self.running.remove(request)
        request.status = RequestStatus.PREEMPTED
        self.waits_from_now(request.request_id, evicted)

    def gives_way(self, which: int | None) -> Request | None:
        request = self.chosen(self.running, which)
        if request is None or self.programs is None:
            return None
        self.programs.account.preempt(self.calls[request.request_id], 1.0)
        self.loses_its_place(request, evicted=False)
        self.queue.prepend_request(request)
        self.queue.remove_request(request)
        return request

    def admit(self, skip: int, places: int) -> None:
        queue, skipped = self.queue, []
        while queue and skip:
            skipped.append(queue.pop_request())
            skip -= 1
        while queue and places and len(self.running) < PLACES:
            request = queue.pop_request()
            places -= 1
            request.status = RequestStatus.RUNNING
            self.running.append(request)
            del self.waiting[request.request_id]
            call = self.calls[request.request_id]
            self.engine_policy.admit(call, self.cached[call.name])
            self.engine_policy.computes(
                call, Chunk(Phase.COLD_PREFILL, 16, self.cached[call.name]), first=True, last=True
            )
        queue.prepend_requests(skipped)

    def after(self, step: Step) -> None:
        """What happens between this step and the next one."""
        if step.charged is not None and self.programs is not None and self.running:
            which, ms = step.charged
            self.programs.table.charge(self.calls[self.running[which % len(self.running)].request_id], ms)
        if (ended := self.chosen(self.running, step.ended)) is not None:
            self.running.remove(ended)
            self.forget(ended)
        waiting = [self.requests[name] for name in self.waiting]
        if (aborted := self.chosen(waiting, step.aborted)) is not None:
            self.queue.remove_requests([aborted])
            self.forget(aborted)
        if (parked := self.chosen(list(self.queue), step.parked)) is not None:
            park(self.list, self.calls, {parked.request_id: BLOCKS[(step.parked or 0) % 3]})

    def forget(self, request: Request) -> None:
        name = request.request_id
        self.engine_policy.end(self.calls.pop(name))
        self.waiting.pop(name, None)
        del self.requests[name]
        self.gone.append(name)

    @staticmethod
    def chosen(among: list[Request], which: int | None) -> Request | None:
        return among[which % len(among)] if which is not None and among else None

    # What must hold.

    def check(self) -> None:
        """Who has waited for the bound is overdue, and nobody else. Before an overdue one stand only those whose waits are
        older, and those that had to give their KV blocks back. Of these the first that came is first.

        Parked requests are not in line while they are parked; what is promised to them belongs here.
        """
        queue = self.queue
        line = [queue[position].request_id for position in range(len(queue) - self.list.parked)]
        for position, name in enumerate(line):
            wait = self.waiting[name]
            urgency = (
                Urgency.PREEMPTED if wait.evicted else Urgency.OVERDUE if self.step >= wait.due else Urgency.NORMAL
            )
            assert queue.key(name).urgency == urgency, name
            for other in line[:position]:
                before = self.waiting[other]
                if wait.evicted:
                    assert before.evicted, (other, name)
                    assert self.arrived[other] < self.arrived[name]
                elif self.step >= wait.due:
                    assert before.evicted or before.number < wait.number, (other, name)
        assert {request.request_id for request in queue} == set(self.waiting)
        assert self.engine_policy.faults(self.calls.values()) == []

    def drain(self) -> None:
        """Nobody comes any more: everybody is served."""
        for _ in range(3 * len(self.requests) + 1):
            self.run(Step(admitted=1, ended=0, released=3))
        assert not self.requests
        assert not self.list.bounded


arrivals = st.builds(
    Arrival,
    session=st.integers(0, 3),
    cached=st.booleans(),
    batch=st.integers(0, 4).map(lambda number: number == 0),
    deadline_ms=st.sampled_from([None, None, 1, 1000]),
    again=st.booleans(),
)
number = st.one_of(st.none(), st.none(), st.integers(0, 11))
steps = st.builds(
    Step,
    arrivals=st.lists(arrivals, max_size=2).map(tuple),
    yields=number,
    evicted=st.one_of(st.none(), number),
    skipped=st.sampled_from([0, 0, 0, 1, 2]),
    admitted=st.integers(0, 2),
    charged=st.one_of(st.none(), st.tuples(st.integers(0, 11), st.floats(0.1, 500.0))),
    ended=number,
    aborted=st.one_of(st.none(), number),
    parked=st.one_of(st.none(), number),
    released=st.one_of(st.none(), st.integers(0, 3)),
)


@pytest.mark.parametrize("policy", ["fcfs", "plas", "atlas"])
@settings(deadline=None, max_examples=12)
@given(st.lists(steps, min_size=20, max_size=60))
def test_nobody_is_overtaken_beyond_the_bound(policy: str, history: list[Step]) -> None:
    nobody_is_overtaken(policy, history)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fcfs", "plas", "atlas"])
@settings(deadline=None, max_examples=40)
@given(st.lists(steps, min_size=20, max_size=60))
def test_nobody_is_overtaken_in_many_histories(policy: str, history: list[Step]) -> None:
    nobody_is_overtaken(policy, history)


def nobody_is_overtaken(policy: str, history: list[Step]) -> None:
    line = Line(policy)
    for step in history:
        line.run(step)
    line.drain()
