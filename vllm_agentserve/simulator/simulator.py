"""A discrete-event simulator of one engine around the policy objects of the scheduler: thousands of programs in seconds.

It knows slots, steps and prompts, not KV memory: contexts are cached, a call computes its uncached tokens and decodes its
answer. Steps cost what the step-time model says. Who is admitted and how long chunks are is decided by the scheduler's own
key, patience and controller, which knows the cost instead of learning it. Steps that only decode are taken together until
something can change.
"""

import heapq
from collections.abc import Sequence
from itertools import count
from typing import Literal

from vllm_agentserve.bench.calls import ProgramShape, forks, origin, tool_chain_s
from vllm_agentserve.bench.cost import StepCost
from vllm_agentserve.policy.budget import StepBudget
from vllm_agentserve.policy.controller import BudgetController, BudgetLimits
from vllm_agentserve.policy.order import BYPASS_STEPS, PATIENT_BYPASS_STEPS, AdmissionKey, Urgency, admission_key
from vllm_agentserve.policy.phase import Phase, classify
from vllm_agentserve.policy.programs import ProgramTable
from vllm_agentserve.policy.target import Backlog
from vllm_agentserve.simulator.calls import Call, Ended, Live
from vllm_agentserve.simulator.known_model import KnownModel
from vllm_agentserve.simulator.queue import SimulatedQueue

Order = Literal["stock", "fcfs", "plas", "atlas", "sjf-oracle", "round-robin"]
PATIENCE = {"fcfs": BYPASS_STEPS, "plas": PATIENT_BYPASS_STEPS, "atlas": PATIENT_BYPASS_STEPS}
"""Steps after which the scheduler lets a waiting call go first, by policy."""


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
        self._order = order
        self._cost = cost
        self._slots = slots
        self._step_tokens = step_tokens
        self._table = table
        self._told = told
        self._controller = BudgetController(BudgetLimits())
        self._controller.whole.model = KnownModel(cost)
        self._now = 0.0
        self._numbers, self._arrived = count(), count()
        self._events: list[tuple[float, int, Live, int]] = []
        relevels = order not in ("stock", "fcfs")
        bound = patience if patience is not None else PATIENCE.get(order)
        self._waiting: SimulatedQueue[Call] = SimulatedQueue(self._key, bound, relevels)
        self._prefilling: list[Call] = []
        self._decoding: list[Call] = []
        self.ended: list[Ended] = []

    def run(self, programs: Sequence[ProgramShape]) -> list[Ended]:
        """Runs all programs to their end; returns them in the order in which they ended."""
        for shape in programs:
            live = Live(shape, sum(self._cost.call_ms(call, self._slots) for call in shape.calls))
            for index, call in enumerate(shape.calls):
                if not call.parents:
                    self._at(shape.arrival_s + call.tool_s, live, index)
        while self._events or self._waiting or self._prefilling or self._decoding:
            self._arrivals()
            if self._prefilling or (self._waiting and len(self._decoding) < self._slots):
                self._mixed_step()
            elif self._decoding:
                self._decode_steps()
            else:
                self._now = self._events[0][0]
        return self.ended

    def _at(self, when: float, live: Live, index: int) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), live, index))

    def _arrivals(self) -> None:
        while self._events and self._events[0][0] <= self._now:
            when, _, live, index = heapq.heappop(self._events)
            calls = live.shape.calls
            shape, before = calls[index], origin(calls, index)
            call = Call(live, index, next(self._arrived), shape.uncached, shape.output)
            known = self._told and before is not None and not forks(calls, index)
            call.phase = classify(shape.context, shape.uncached, known)
            if self._table is not None:
                # The scheduler sees which call a prompt goes on from, and for a join what else ended since.
                path, end = live.ends[before] if before is not None else (0.0, None)
                self._table.arrive(call.name, live.shape.name, path, when, end=end)
            self._waiting.add(call.name, call, when)

    def _key(self, call: Call) -> AdmissionKey:
        if self._order == "stock":
            return AdmissionKey(Urgency.NORMAL, cold=True, arrival=call.number)
        shape, resume_budget = call.shape, self._controller.resume_tokens
        key = admission_key(call.phase, shape.uncached, call.number, resume_budget)
        if self._table is not None:
            return key._replace(level=self._table.level(call.name, self._now))
        if self._order == "sjf-oracle":
            return key._replace(level=round(call.live.left_ms * 1000))
        return key._replace(level=call.live.served) if self._order == "round-robin" else key

    def _context(self) -> int:
        return sum(
            call.shape.context + call.shape.uncached + call.shape.output - call.output for call in self._decoding
        )

    def _budget(self, context: int) -> StepBudget:
        decodes = len(self._decoding)
        room = max(self._step_tokens - decodes, 1)
        phases = {call.served_as for call in self._prefilling}
        waiting_resumes = self._waiting.waiting_resume_tokens(self._slots - decodes - len(self._prefilling))
        return self._controller.plan(
            decodes,
            context,
            room,
            resumes=waiting_resumes > 0 or Phase.RESUME_PREFILL in phases,
            colds=Phase.COLD_PREFILL in phases or self._waiting.has_cold(),
            waiting_resume_tokens=waiting_resumes,
            admits=bool(self._waiting) and not self._prefilling,
            backlog=self._backlog(),
        )

    def _backlog(self) -> Backlog:
        waiting = self._waiting.backlog(self._now)
        left = sum(call.prefill for call in self._prefilling)
        return Backlog(waiting.prompts + len(self._prefilling), waiting.tokens + left, waiting.waited_ms)

    def _mixed_step(self) -> None:
        """A step with prompts: those that are being read go on, then others are admitted while there is room."""
        context = self._context()
        budget = None if self._order == "stock" else self._budget(context)
        room = max(self._step_tokens - len(self._decoding), 1)
        chunks: list[tuple[Call, int]] = []

        def grant(call: Call) -> int:
            wanted = min(call.prefill, room)
            if budget is None or not wanted:
                return wanted
            return budget.grant(call.served_as, wanted, call.computed)

        if budget is not None:
            self._waiting.colds_wait = any(
                call.served_as is Phase.COLD_PREFILL and not budget.finishes(call.prefill, call.computed)
                for call in self._prefilling
            )
        for call in self._prefilling:
            if tokens := grant(call):
                chunks.append((call, tokens))
                room -= tokens
        while room and len(self._prefilling) + len(self._decoding) < self._slots:
            offered = self._waiting.first()
            if offered is None:
                break
            call = offered
            short = call.phase is Phase.RESUME_PREFILL and call.prefill <= self._controller.resume_tokens
            call.served_as = Phase.RESUME_PREFILL if short else Phase.COLD_PREFILL
            tokens = grant(call)
            if not tokens:
                break
            self._waiting.pop()
            if budget is not None and call.served_as is Phase.COLD_PREFILL and tokens < call.prefill:
                self._waiting.colds_wait = True
            call.live.served += 1
            self._prefilling.append(call)
            chunks.append((call, tokens))
            room -= tokens
        self._waiting.colds_wait = False
        self._compute(chunks, context, budget)
        done = [call for call in self._prefilling if not call.prefill]
        self._prefilling = [call for call in self._prefilling if call.prefill]
        for call in done:
            # The step that ends a prompt gives its first token.
            call.output -= 1
            if self._table is not None:
                self._table.decodes(call.name)
            self._decoding.append(call)
        self._finish()

    def _compute(self, chunks: Sequence[tuple[Call, int]], context: int, budget: StepBudget | None) -> None:
        decodes = len(self._decoding)
        granted = [(call.phase, tokens, call.computed) for call, tokens in chunks]
        took_ms = self._cost.step_ms(decodes, context, [chunk[1:] for chunk in granted])
        left_ms = took_ms
        for call, tokens in chunks:
            ms = self._cost.chunk_ms(tokens, call.computed)
            call.prefill -= tokens
            left_ms -= ms
            if self._table is not None:
                self._table.charge(call.name, ms)
        # What the chunks do not account for is charged to the decodes, as the scheduler does.
        self._step(took_ms, left_ms, 1)
        self._controller.observe(took_ms, took_ms if decodes else None, decodes, context, granted, budget=budget)

    def _decode_steps(self) -> None:
        context = self._context()
        each_ms = self._cost.decode_ms(len(self._decoding), context)
        steps = min(call.output for call in self._decoding)
        if self._events and len(self._decoding) < self._slots:
            until = (self._events[0][0] - self._now) * 1000
            steps = min(steps, int(until / each_ms) + 1)
        self._controller.observe(each_ms, each_ms, len(self._decoding), context, None)
        # Contexts grow by a token a step.
        took_ms = steps * (each_ms + self._cost.context * len(self._decoding) * (steps - 1) / 2000)
        self._step(took_ms, took_ms, steps)
        self._finish()

    def _step(self, took_ms: float, decode_ms: float, steps: int) -> None:
        self._now += took_ms / 1000
        self._waiting.passed(steps)
        for call in self._decoding:
            call.output -= steps
        if self._table is not None and self._decoding:
            self._table.advance(decode_ms / len(self._decoding))

    def _finish(self) -> None:
        done = [call for call in self._decoding if call.output <= 0]
        self._decoding = [call for call in self._decoding if call.output > 0]
        for call in done:
            live = call.live
            ended = self._table.finish(call.name, self._now) if self._table is not None else None
            live.ends[call.index] = (ended[1], self._table.ended) if self._table is not None and ended else (0.0, 0)
            live.left_ms -= self._cost.call_ms(call.shape, self._slots)
            for index, child in enumerate(live.shape.calls):
                if call.index in child.parents and all(parent in live.ends for parent in child.parents):
                    self._at(self._now + child.tool_s, live, index)
            if len(live.ends) == len(live.shape.calls):
                self.ended.append(
                    Ended(
                        live.shape.name,
                        self._now - live.shape.arrival_s,
                        sum(one.output for one in live.shape.calls),
                        tool_chain_s(live.shape),
                        self._now,
                    )
                )
