"""A discrete-event simulator of one engine around the policy objects of the scheduler: thousands of programs in seconds.

It knows slots, steps and prompts, not KV memory: contexts are cached, a call computes its uncached tokens and decodes its
answer. Steps cost what the step-time model says. Who is admitted and how long chunks are is decided by the scheduler's own
`EnginePolicy`, whose controller knows the cost instead of learning it. Steps that only decode are taken together until
something can change.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from math import inf
from typing import Literal

from vllm_agentserve.bench.calls import ProgramShape, forks, origin, tool_chain_s
from vllm_agentserve.bench.cost import StepCost
from vllm_agentserve.bench.walk import DueCall
from vllm_agentserve.policy.call import Call, Chunk, Owner
from vllm_agentserve.policy.controller import BudgetController, BudgetLimits
from vllm_agentserve.policy.engine import EnginePolicy, NoPrograms
from vllm_agentserve.policy.order import BYPASS_STEPS, DECIDE_STEPS, LOOK_AHEAD, PATIENT_BYPASS_STEPS
from vllm_agentserve.policy.preemption import PreemptionAccount
from vllm_agentserve.policy.program_order import ProgramOrder
from vllm_agentserve.policy.programs import ProgramTable
from vllm_agentserve.policy.waiting import WaitingList
from vllm_agentserve.simulator.calls import Ended, Live, SimulatedRequest
from vllm_agentserve.simulator.known_model import KnownModel
from vllm_agentserve.simulator.orders import FewestServed, ShortestLeft, StockPolicy

Order = Literal["stock", "fcfs", "plas", "atlas", "sjf-oracle", "round-robin"]
PATIENCE = {"fcfs": BYPASS_STEPS, "plas": PATIENT_BYPASS_STEPS, "atlas": PATIENT_BYPASS_STEPS}
"""Steps after which the scheduler lets a waiting call go first, by policy."""
ORACLES = {"sjf-oracle": ShortestLeft, "round-robin": FewestServed}


class Simulator:
    """One engine.

    Args:
        order: of waiting calls; `fcfs`, `plas` and `atlas` are the scheduler's own, with its chunks. `stock` is vLLM's: by
            arrival, whole prompts. `sjf-oracle` knows what is left of every program and `round-robin` takes the program with
            the fewest calls served; they have the scheduler's chunks.
        cost: of steps.
        slots: sequences at once.
        step_tokens: tokens of a step at most.
        table: of `plas` and `atlas`.
        told: whether requests carry session ids, by which the scheduler knows that a session has run before.
        patience: steps a call may be overtaken before it goes first; None takes the scheduler's bound for this order.
    """

    def __init__(
        self,
        order: Order,
        cost: StepCost,
        slots: int,
        step_tokens: int,
        table: ProgramTable | None = None,
        told: bool = True,
        patience: int | None = None,
    ) -> None:
        if (table is not None) != (order in ("plas", "atlas")):
            raise ValueError(f"order {order!r} goes {'with' if table is None else 'without'} a program table")
        self._cost = cost
        self._slots = slots
        self._step_tokens = step_tokens
        self._told = told
        self._now = 0.0
        self._step = self._decided = 0
        self._clock_s = 0.0
        """What the policy takes for the time: for an arrival its own, which may lie inside the step before."""
        self._numbers = count()
        self._events: list[tuple[float, int, Live, int]] = []
        controller = BudgetController(BudgetLimits())
        controller.whole.model = KnownModel(cost)
        counts: Counter[str] = Counter()
        programs: NoPrograms = NoPrograms()
        if table is not None:
            account = PreemptionAccount(0.0)
            programs = ProgramOrder(table, controller.prompt_ms, account, counts)  # type: ignore[arg-type]
        elif order in ORACLES:
            programs = ORACLES[order]()
        bound = patience if patience is not None else PATIENCE.get(order, inf)
        kind, cuts = (StockPolicy, False) if order == "stock" else (EnginePolicy, True)
        self.policy = kind(self, controller, counts, lambda: self._clock_s, self, programs, bound, cuts=cuts)  # type: ignore[arg-type]
        assert isinstance(self.policy.waiting, WaitingList)
        self._waiting: WaitingList = self.policy.waiting
        self._decoding: list[Call] = []
        self.ended: list[Ended] = []

    # What the policy asks of an engine.

    def cached_tokens(self, call: Call) -> int:
        return int(call.request.shape.context)

    def is_blocked(self, call: Call) -> bool:
        return False

    def when_ready(self, call: Call, tell: Callable[[Call], None]) -> bool:
        return False

    def is_preempted(self, call: Call) -> bool:
        return False

    def has_room(self, call: Call) -> bool:
        return True

    def owner(self, call: Call) -> Owner:
        """The scheduler sees which call a prompt goes on from, and for a join what else ended since."""
        live, before = call.request.live, call.request.before
        path, end = live.ends[before] if before is not None else (0.0, None)
        return Owner(live.shape.name, path, end=end)

    def remember(self, call: Call, path_ms: float, end: int) -> None:
        call.request.live.ends[call.request.index] = path_ms, end

    def run(self, programs: Sequence[ProgramShape]) -> list[Ended]:
        """Runs all programs to their end; returns them in the order in which they ended."""
        for shape in programs:
            live = Live(shape, sum(self._cost.call_ms(call, self._slots) for call in shape.calls))
            self._plan(live, live.walk.begin(shape.arrival_s))
        while self._events or len(self._waiting) or self.policy.prefilling or self._decoding:
            self._arrivals()
            if self.policy.prefilling or (len(self._waiting) and len(self._decoding) < self._slots):
                self._mixed_step()
            elif self._decoding:
                self._decode_steps()
            else:
                self._now = self._events[0][0]
        return self.ended

    def _plan(self, live: Live, calls: Sequence[DueCall[int]]) -> None:
        for due in calls:
            heapq.heappush(self._events, (due.at_s, next(self._numbers), live, due.name))

    def _arrivals(self) -> None:
        self.policy.decodes = len(self._decoding)
        while self._events and self._events[0][0] <= self._now:
            self._clock_s, _, live, index = heapq.heappop(self._events)
            calls = live.shape.calls
            before = origin(calls, index)
            known = self._told and before is not None and not forks(calls, index)
            call = Call(SimulatedRequest(live, index, before, live.shape.name if known else None))
            self.policy.arrive(call)
            self._waiting.add(call)
        self._clock_s = self._now

    def _context(self) -> int:
        """Tokens that the decoding calls attend to, together."""
        return sum(call.request.num_tokens + call.request.shape.output - call.request.output for call in self._decoding)

    def _mixed_step(self) -> None:
        """A step with prompts: those that are being computed go on, then others are admitted while there is room."""
        policy, waiting, decodes = self.policy, self._waiting, len(self._decoding)
        context, room = self._context(), max(self._step_tokens - decodes, 1)
        self._begin_step()
        places = self._slots - decodes - len(policy.prefilling)
        budget = policy.plan(decodes, context, room, places, waits=len(waiting) > 0)
        chunks: list[tuple[Call, Chunk, bool]] = []
        for call in list(policy.prefilling):
            room -= self._take(call, room, chunks, new=False)
        while room and places and waiting.open:
            offered = waiting.first()
            assert offered is not None
            policy.admit(offered, offered.request.num_computed_tokens)
            taken = self._take(offered, room, chunks, new=True)
            if not taken:
                policy.stops(offered)
                break
            waiting.pop()
            offered.request.live.served += 1
            room -= taken
            places -= 1
        policy.end_step(room > 0)
        waiting.reopen()
        granted = [chunk for _, chunk, _ in chunks]
        took_ms = self._cost.step_ms(decodes, context, [(chunk.tokens, chunk.context) for chunk in granted])
        self._advance(took_ms, 1)
        for call, chunk, first in chunks:
            call.request.num_computed_tokens += chunk.tokens
            policy.computes(call, chunk, first, last=not call.left)
            if not call.left:
                # The step that ends a prompt gives its first token.
                call.request.output -= 1
                self._decoding.append(call)
        policy.observe(took_ms, took_ms if decodes else None, decodes, context, granted, budget=budget)
        self._finish()

    def _begin_step(self) -> None:
        """As the scheduler's steps do; those that were taken together are caught up with."""
        decisions = self._step // DECIDE_STEPS - self._decided
        self._decided += decisions
        self._waiting.begin_step(self._step, relevels=False)
        if self.policy.programs.relevels:
            # More often than once around changes nothing.
            for _ in range(min(decisions, len(self._waiting) // LOOK_AHEAD + 1)):
                self._waiting.relevel(LOOK_AHEAD)

    def _take(self, call: Call, room: int, chunks: list[tuple[Call, Chunk, bool]], new: bool) -> int:
        """Gives a prompt its tokens of the step, and notes them as a chunk."""
        tokens = min(call.left, room)
        if tokens and self.policy.cuts:
            tokens = self.policy.grant(call, tokens, call.request.num_computed_tokens, new)
        if tokens:
            chunks.append((call, Chunk(call.chunk_phase, tokens, call.request.num_computed_tokens), new))
        return tokens

    def _decode_steps(self) -> None:
        context, decodes = self._context(), len(self._decoding)
        each_ms = self._cost.decode_ms(decodes, context)
        steps = min(call.request.output for call in self._decoding)
        if self._events and decodes < self._slots:
            until = (self._events[0][0] - self._now) * 1000
            steps = min(steps, int(until / each_ms) + 1)
        self.policy.controller.observe(each_ms, each_ms, decodes, context, None)
        # Contexts grow by a token a step.
        took_ms = steps * (each_ms + self._cost.context * decodes * (steps - 1) / 2000)
        self._advance(took_ms, steps)
        self.policy.programs.stepped(decodes, took_ms, ())
        self._finish()

    def _advance(self, took_ms: float, steps: int) -> None:
        self._now += took_ms / 1000
        self._clock_s = self._now
        self._step += steps
        for call in self._decoding:
            call.request.output -= steps

    def _finish(self) -> None:
        done = [call for call in self._decoding if call.request.output <= 0]
        self._decoding = [call for call in self._decoding if call.request.output > 0]
        for call in done:
            live: Live = call.request.live
            self.policy.end(call)
            if self._told:
                self.policy.sessions.touch(live.shape.name)
            live.left_ms -= self._cost.call_ms(call.request.shape, self._slots)
            self._plan(live, live.walk.end(call.request.index, self._now))
            if live.walk.over:
                self.ended.append(
                    Ended(
                        live.shape.name,
                        self._now - live.shape.arrival_s,
                        sum(one.output for one in live.shape.calls),
                        tool_chain_s(live.shape),
                        self._now,
                    )
                )
