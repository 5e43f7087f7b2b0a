"""A discrete-event simulator of one engine around the policy objects of the scheduler: thousands of programs in seconds.

It knows slots, steps and prompts, not KV memory: contexts are cached, a call computes its uncached tokens and decodes its
answer. Steps cost what the step-time model says. Steps that only decode are taken together until something can change.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from vllm_agentserve.policy.programs import ProgramTable

Order = Literal["fcfs", "plas", "atlas", "sjf-oracle", "round-robin"]
RELEVEL = 64
"""Waiting calls are put in order anew after so many admissions."""


@dataclass(frozen=True)
class CallShape:
    """One call: what it computes, and what has to end before it.

    Args:
        uncached: prompt tokens to compute.
        context: tokens before them.
        output: tokens to decode, at least 1.
        tool_s: time between the end of the last parent and this call.
        parents: indices of earlier calls of the program; empty for the first ones.
    """

    uncached: int
    context: int
    output: int
    tool_s: float = 0.0
    parents: tuple[int, ...] = ()


@dataclass(frozen=True)
class ProgramShape:
    name: str
    arrival_s: float
    calls: tuple[CallShape, ...]


@dataclass(frozen=True)
class StepCost:
    """Durations in ms, as `StepModel` has them: a step, plus per sequence, per thousand tokens of context; a chunk per thousand
    tokens and per thousand tokens times thousand tokens attended to."""

    base: float
    sequence: float
    context: float
    tokens: float
    attended: float

    def decode_ms(self, sequences: int, context: float) -> float:
        return self.base + self.sequence * sequences + self.context * context / 1000 if sequences else 0.0

    def chunk_ms(self, tokens: int, before: int) -> float:
        return (self.tokens + self.attended * (before + tokens / 2) / 1000) * tokens / 1000

    def call_ms(self, call: CallShape, sequences: int) -> float:
        """Engine time of a call in a batch of so many sequences."""
        each = self.decode_ms(sequences, sequences * (call.context + call.uncached)) / sequences
        return self.chunk_ms(call.uncached, call.context) + call.output * each


@dataclass
class Ended:
    """A program that is through.

    Args:
        seconds: from its arrival to the end of its last call.
        tokens: decoded.
        tools_s: longest chain of its tool times, which no scheduler can shorten.
    """

    name: str
    seconds: float
    tokens: int
    tools_s: float

    @property
    def per_token_s(self) -> float:
        return self.seconds / self.tokens


@dataclass
class _Live:
    """A program that is not through: calls ended, ends of calls, and what is left of it for the oracle."""

    shape: ProgramShape
    left_ms: float
    ends: dict[int, tuple[float, float | None]] = field(default_factory=dict)
    """By call: when it ended, and the path to its end."""
    served: int = 0


@dataclass
class _Call:
    live: _Live
    index: int
    arrived: float
    number: int
    prefill: int
    output: int

    @property
    def shape(self) -> CallShape:
        return self.live.shape.calls[self.index]

    @property
    def name(self) -> str:
        return f"{self.live.shape.name}/{self.index}"


class Simulator:
    """One engine.

    Args:
        order: of waiting calls; `plas` and `atlas` are the scheduler's own, `sjf-oracle` knows what is left of every program,
            `round-robin` takes the program with the fewest calls served.
        cost: of steps.
        slots: sequences at once.
        step_tokens: tokens of a step at most.
        table: of `plas` and `atlas`.
    """

    def __init__(
        self, order: Order, cost: StepCost, slots: int, step_tokens: int, table: ProgramTable | None = None
    ) -> None:
        if (table is not None) != (order in ("plas", "atlas")):
            raise ValueError(f"order {order!r} goes {'with' if table is None else 'without'} a program table")
        self._order = order
        self._cost = cost
        self._slots = slots
        self._step_tokens = step_tokens
        self._table = table
        self._now = 0.0
        self._numbers = count()
        self._events: list[tuple[float, int, _Live, int]] = []
        self._waiting: list[tuple[float, float, int, _Call]] = []
        self._prefilling: list[_Call] = []
        self._decoding: list[_Call] = []
        self._admissions = 0
        self.ended: list[Ended] = []

    def run(self, programs: Sequence[ProgramShape]) -> list[Ended]:
        """Runs all programs to their end; returns them in the order in which they ended."""
        for shape in programs:
            live = _Live(shape, sum(self._cost.call_ms(call, self._slots) for call in shape.calls))
            for index, call in enumerate(shape.calls):
                if not call.parents:
                    self._at(shape.arrival_s + call.tool_s, live, index)
        while self._events or self._waiting or self._prefilling or self._decoding:
            self._arrivals()
            self._admit()
            if self._prefilling:
                self._mixed_step()
            elif self._decoding:
                self._decode_steps()
            else:
                self._now = self._events[0][0]
        return self.ended

    def _at(self, when: float, live: _Live, index: int) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), live, index))

    def _arrivals(self) -> None:
        while self._events and self._events[0][0] <= self._now:
            when, number, live, index = heapq.heappop(self._events)
            shape = live.shape.calls[index]
            call = _Call(live, index, when, number, shape.uncached, shape.output)
            if self._table is not None:
                paths = [path for parent in shape.parents if (path := live.ends[parent][1]) is not None]
                self._table.arrive(call.name, live.shape.name, max(paths, default=0.0), when)
            self._push(call)

    def _push(self, call: _Call) -> None:
        heapq.heappush(self._waiting, (self._urgency(call), call.arrived, call.number, call))

    def _urgency(self, call: _Call) -> float:
        if self._table is not None:
            return float(self._table.level(call.name, self._now))
        if self._order == "sjf-oracle":
            return call.live.left_ms
        return float(call.live.served) if self._order == "round-robin" else 0.0

    def _admit(self) -> None:
        while self._waiting and len(self._prefilling) + len(self._decoding) < self._slots:
            self._admissions += 1
            if self._order != "fcfs" and self._admissions % RELEVEL == 0:
                calls = [entry[-1] for entry in self._waiting]
                self._waiting = [(self._urgency(call), call.arrived, call.number, call) for call in calls]
                heapq.heapify(self._waiting)
            call = heapq.heappop(self._waiting)[-1]
            call.live.served += 1
            self._prefilling.append(call)

    def _decode_ms(self) -> float:
        context = sum(call.shape.context + call.shape.uncached for call in self._decoding)
        return self._cost.decode_ms(len(self._decoding), context)

    def _mixed_step(self) -> None:
        room = max(self._step_tokens - len(self._decoding), 1)
        decode_ms = self._decode_ms()
        took_ms = decode_ms or self._cost.base
        for call in self._prefilling:
            tokens = min(call.prefill, room)
            if not tokens:
                break
            room -= tokens
            ms = self._cost.chunk_ms(tokens, call.shape.context + call.shape.uncached - call.prefill)
            call.prefill -= tokens
            took_ms += ms
            if self._table is not None:
                self._table.charge(call.name, ms)
        self._step(took_ms, decode_ms, 1)
        done = [call for call in self._prefilling if not call.prefill]
        self._prefilling = [call for call in self._prefilling if call.prefill]
        for call in done:
            # The step that ends a prompt gives its first token.
            call.output -= 1
            if self._table is not None:
                self._table.decodes(call.name)
            self._decoding.append(call)
        self._finish()

    def _decode_steps(self) -> None:
        each_ms = self._decode_ms()
        steps = min(call.output for call in self._decoding)
        if self._events and len(self._decoding) < self._slots:
            until = (self._events[0][0] - self._now) * 1000
            steps = min(steps, int(until / each_ms) + 1)
        self._step(steps * each_ms, steps * each_ms, steps)
        self._finish()

    def _step(self, took_ms: float, decode_ms: float, steps: int) -> None:
        self._now += took_ms / 1000
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
            live.ends[call.index] = self._now, ended[1] if ended is not None else None
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
                    )
                )


def tool_chain_s(shape: ProgramShape) -> float:
    """The longest sum of tool times along a path through the program's calls."""
    longest: list[float] = []
    for call in shape.calls:
        longest.append(call.tool_s + max((longest[parent] for parent in call.parents), default=0.0))
    return max(longest)
