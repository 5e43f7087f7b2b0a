"""Nobody is overtaken beyond the bound: the real order and queue under drawn steps, without an engine.

`Line` plays vLLM's scheduler: it asks for the first in line, skips some, and takes places away, as `Scheduler.schedule()` does.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.logger import init_logger
from vllm.v1.request import Request, RequestStatus

from tests.support.schedulers import make_request
from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.policy.controller import BudgetController, BudgetLimits
from vllm_agentserve.policy.order import Urgency
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.preemption import PreemptionAccount
from vllm_agentserve.scheduler.admission import Admission
from vllm_agentserve.scheduler.log_messages import LogMessages
from vllm_agentserve.scheduler.programs import ProgramTracker
from vllm_agentserve.scheduler.queues import AgentQueue
from vllm_agentserve.scheduler.stats import StatsCollector

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
        options = AgentServeConfig(**names)  # type: ignore[arg-type]
        controller = BudgetController(BudgetLimits())
        stats = StatsCollector(controller)
        self.programs = ProgramTracker(options, controller, stats, 16) if self.policy != "fcfs" else None
        if self.programs is not None:
            self.programs.account = PreemptionAccount(0.5)
        self.asked = ""
        scheduler: Any = SimpleNamespace(requests=self.requests, kv_cache_manager=self, coordinator=self)
        self.coordinator = self
        self.admission = Admission(
            scheduler, controller, stats, self.programs, LogMessages(init_logger("vllm.agentserve"))
        )
        self.queue = AgentQueue(self.admission.key, BOUND, BATCH_BOUND)

    # What the admission order asks of the KV cache.

    def prefix_cache_lookup_enabled(self, request: Request) -> bool:
        self.asked = request.request_id
        return True

    def find_longest_cache_hit(self, hashes: Any, tokens: int) -> tuple[None, int]:
        return None, self.cached[self.asked]

    # What happens.

    def run(self, step: Step) -> None:
        queue = self.queue
        for arrival in step.arrivals:
            self.arrive(arrival)
        queue.step = self.step
        if step.released is not None:
            queue.release(step.released if step.released < 3 else None, BLOCKS[: step.released % 3])
        queue.promote_overdue()
        if self.step % 3 == 0 and self.programs is not None:
            queue.relevel(2)
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
        self.admission.arrives(request)
        self.requests[name] = request
        self.arrived[name] = self.waits
        (self.batch.add if arrival.batch else self.batch.discard)(name)
        self.waits_from_now(name)
        self.queue.step = self.step
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
        if request is None or self.programs is None or self.programs.account is None:
            return None
        self.programs.account.preempt(request.request_id, 1.0)
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
            if self.programs is not None:
                self.programs.runs(request, self.cached[request.request_id])
                self.programs.computes(request, Phase.COLD_PREFILL, 16, 0)
                self.programs.table.decodes(request.request_id)
        queue.prepend_requests(skipped)

    def after(self, step: Step) -> None:
        """What happens between this step and the next one."""
        if step.charged is not None and self.programs is not None and self.running:
            which, ms = step.charged
            self.programs.table.charge(self.running[which % len(self.running)].request_id, ms)
        if (ended := self.chosen(self.running, step.ended)) is not None:
            self.running.remove(ended)
            self.forget(ended)
        waiting = [self.requests[name] for name in self.waiting]
        if (aborted := self.chosen(waiting, step.aborted)) is not None:
            self.queue.remove_requests([aborted])
            self.forget(aborted)
        if (parked := self.chosen(list(self.queue), step.parked)) is not None:
            self.queue.park({parked.request_id: BLOCKS[(step.parked or 0) % 3]})

    def forget(self, request: Request) -> None:
        name = request.request_id
        self.admission.forget(request)
        self.queue.forget(name)
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
        line = [queue[position].request_id for position in range(len(queue) - queue.parked)]
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
        assert queue.faults(self.requests) == []
        if self.programs is not None:
            assert self.programs.table.faults(self.requests) == []

    def drain(self) -> None:
        """Nobody comes any more: everybody is served."""
        for _ in range(3 * len(self.requests) + 1):
            self.run(Step(admitted=1, ended=0, released=3))
        assert not self.requests
        assert not len(self.queue._patience) + len(self.queue._batch_patience)


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
@settings(deadline=None, max_examples=40)
@given(st.lists(steps, min_size=20, max_size=60))
def test_nobody_is_overtaken_beyond_the_bound(policy: str, history: list[Step]) -> None:
    line = Line(policy)
    for step in history:
        line.run(step)
    line.drain()
