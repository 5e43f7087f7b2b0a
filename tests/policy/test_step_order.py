"""Who goes before whom among the prompts of a step: tables, and what holds for any arrivals.

`Walk` plays vLLM's scheduler: it asks for running calls in the order in which they were admitted, then for waiting ones.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.calls import call_of
from tests.support.step_models import FlatModel
from vllm_agentserve.policy.budget import UNLIMITED, ChunkRules, Standing, StepBudget
from vllm_agentserve.policy.call import Call, Chunk
from vllm_agentserve.policy.controller import BudgetController, BudgetLimits
from vllm_agentserve.policy.engine import EnginePolicy, NoAttribution, NoPrograms
from vllm_agentserve.policy.order import Urgency
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.step_order import StepOrder, place
from vllm_agentserve.policy.waiting import WaitingList

COLD, RESUME = Phase.COLD_PREFILL, Phase.RESUME_PREFILL
BOUND, BATCH_BOUND = 7, 15
FLOOR, STEP_TOKENS, PLACES = 4, 64, 5


def budget(prefill_ms: float, **given: Any) -> StepBudget:
    settings = {"tokens": 1000, "resume_tokens": 256, "reserved_tokens": 0}
    return StepBudget(FlatModel(), ChunkRules(16, 1), prefill_ms, **(settings | given))


@pytest.mark.parametrize(
    ("prefill_ms", "given", "asked", "granted"),
    [
        # a better one needs 60 of 100: 40 are left, and the better one has its own
        (10.0, {}, [(COLD, 500, Standing(60, True)), (COLD, 60, Standing(behind=False))], [40, 60]),
        # it needs all: the floor, and the better one has the rest: 16 + 80 is a size of steps
        (10.0, {}, [(COLD, 500, Standing(500, True)), (COLD, 500, Standing(behind=False))], [16, 80]),
        # one floor for all that yield, and one for the better one where there is no time
        (
            0.0,
            {},
            [(COLD, 500, Standing(9, True)), (COLD, 500, Standing(9, True)), (COLD, 500, Standing())],
            [16, 0, 16],
        ),
        # what is reserved for resume prefills comes on top
        (10.0, {"reserved_tokens": 30}, [(COLD, 500, Standing(20, True)), (RESUME, 30, Standing())], [48, 30]),
        # a resume prefill yields as well
        (10.0, {}, [(RESUME, 200, Standing(70, True)), (COLD, 70, Standing())], [30, 70]),
        # a step without a target
        (UNLIMITED, {}, [(COLD, 5000, Standing(300, True)), (COLD, 300, Standing())], [700, 300]),
        (UNLIMITED, {}, [(COLD, 5000, Standing(3000, True)), (COLD, 3000, Standing())], [16, 984]),
        # nobody decodes: time bounds only those who are behind others
        (10.0, {"alone": True}, [(RESUME, 300, Standing(behind=False)), (COLD, 500, Standing())], [256, 16]),
        (
            10.0,
            {"alone": True},
            [(COLD, 5000, Standing(behind=False, followed=True)), (COLD, 500, Standing(0, True))],
            [984, 16],
        ),
        (10.0, {"alone": True}, [(COLD, 5000, Standing(behind=False))], [1000]),
        # a resume prefill leaves a better one its part of the resume budget too
        (100.0, {}, [(RESUME, 256, Standing(50, True, resumes=50)), (RESUME, 50, Standing(behind=False))], [192, 50]),
        # what is left is not enough for the floor of a worse one
        (
            10.0,
            {"alone": True, "tokens": 100},
            [(RESUME, 90, Standing(behind=False)), (RESUME, 8, Standing(behind=False, followed=True))],
            [90, 0],
        ),
        # a step so small that two floors do not fit
        (10.0, {"tokens": 10}, [(COLD, 500, Standing(500, True)), (COLD, 5, Standing())], [5, 5]),
    ],
)
def test_grants(prefill_ms: float, given: dict[str, Any], asked: list[Any], granted: list[int]) -> None:
    step = budget(prefill_ms, **given)
    assert [step.grant(phase, wanted, 0, standing) for phase, wanted, standing in asked] == granted


def test_what_goes_on_knows_what_it_has_to_leave() -> None:
    assert budget(10.0).finishes(100, 0)
    assert not budget(10.0).finishes(100, 0, Standing(1, True))
    assert budget(10.0, alone=True).finishes(1000, 0, Standing(behind=False))
    assert not budget(10.0, alone=True).finishes(1000, 0, Standing(behind=False, followed=True))


@dataclass
class Walk:
    """Steps of an engine whose prompts cost 0.1 ms a token beside decodes that cost nothing."""

    target_ms: float = 3.0
    step: int = 0
    running: list[Call] = field(default_factory=list)
    answers: dict[Call, int] = field(default_factory=dict)
    came: dict[Call, int] = field(default_factory=dict)
    bounds: tuple[int, int] = (BOUND, BATCH_BOUND)
    room: bool = True
    """Whether it says that a waiting call finds KV blocks."""
    turned_away: Call | None = None
    """One that finds none all the same."""

    def __post_init__(self) -> None:
        limits = BudgetLimits(tpot_slo_ms=self.target_ms, prefill_floor_tokens=FLOOR, chunk_granularity_tokens=1)
        controller = BudgetController(limits)
        controller.whole.model = FlatModel()
        controller.whole.trust._tokens = controller.whole.trust._attended = 1e9
        bounds: dict[str, Any] = dict(zip(("bypass_steps", "batch_bypass_steps"), self.bounds, strict=True))
        self.policy = EnginePolicy(
            self, controller, Counter(), lambda: float(self.step), NoAttribution(), NoPrograms(), **bounds
        )
        assert isinstance(self.policy.waiting, WaitingList)
        self.waiting: WaitingList = self.policy.waiting

    # What the policy asks of the engine.

    def cached_tokens(self, call: Call) -> int:
        return int(call.request.num_computed_tokens)

    def is_blocked(self, call: Call) -> bool:
        return False

    def when_ready(self, call: Call, tell: Callable[[Call], None]) -> bool:
        return False

    def is_preempted(self, call: Call) -> bool:
        return False

    def has_room(self, call: Call) -> bool:
        return self.room

    # What happens.

    def arrive(self, call: Call, answer: int = 1) -> Call:
        self.policy.arrive(call)
        self.policy.decodes = len(self.running) - len(self.policy.prefilling)
        self.waiting.step = self.step
        self.waiting.add(call)
        self.answers[call], self.came[call] = answer, self.step
        return call

    def run(self) -> dict[str, int]:
        policy, waiting = self.policy, self.waiting
        decoding = [call for call in self.running if call.served_as is None]
        policy.begin_step(self.step)
        room = STEP_TOKENS - len(decoding)
        policy.plan(len(decoding), 0, room, PLACES - len(self.running), len(waiting) > 0)
        row: dict[str, int] = {}
        chunks: list[tuple[Call, Chunk, bool]] = []
        for call in [call for call in self.running if call.served_as is not None]:
            self.check_before(call)
            room -= self.take(call, room, chunks, new=False)
        while room and len(self.running) < PLACES and waiting.open:
            call = waiting.first()
            assert call is not None
            policy.admit(call, call.request.num_computed_tokens)
            taken = self.take(call, room, [] if call is self.turned_away else chunks, new=True)
            if not taken or call is self.turned_away:
                policy.stops(call)
                break
            assert waiting.pop() is call
            self.running.append(call)
            room -= taken
        policy.end_step(room > 0)
        waiting.reopen()
        for call, chunk, first in chunks:
            call.request.num_computed_tokens += chunk.tokens
            policy.computes(call, chunk, first, last=not call.left)
            row[call.name] = chunk.tokens
        assert sum(row.values()) <= STEP_TOKENS - len(decoding)
        self.step += 1
        for call in [*decoding, *(call for call, _, _ in chunks if not call.left)]:
            self.answers[call] -= 1
            if not self.answers[call]:
                self.running.remove(call)
                policy.end(call)
                del self.came[call]
        assert policy.faults(self.came) == []
        return row

    def take(self, call: Call, room: int, chunks: list[tuple[Call, Chunk, bool]], new: bool) -> int:
        wanted = min(call.left, room)
        tokens = self.policy.grant(call, wanted, call.request.num_computed_tokens, new) if wanted else 0
        if tokens:
            chunks.append((call, Chunk(call.chunk_phase, tokens, call.request.num_computed_tokens), new))
        return tokens

    def check_before(self, call: Call) -> None:
        """Once it has been there for the bound, none that came later is before it."""
        if self.step < self.came[call] + self.bounds[call.hints.batch]:
            return
        own, order = place(call), self.policy._order
        assert all(place(other) > own for other in self.policy.prefilling if other.wait_number > call.wait_number)
        if isinstance(order, StepOrder):
            assert all(other.wait_number <= call.wait_number for other, key in order._places.items() if key < own)


arrivals = st.builds(
    dict,
    tokens=st.integers(1, 300),
    cached=st.sampled_from([0, 0, 400]),
    batch=st.booleans(),
    due=st.sampled_from([inf, inf, 10.0, 20.0, 500.0]),
    answer=st.integers(1, 12),
)


def call(name: str, tokens: int, cached: int = 0, batch: bool = False, due: float = inf) -> Call:
    made = call_of(name, tokens + cached, cached, batch=batch)
    made.due = due
    return made


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(arrivals, max_size=2), min_size=1, max_size=50), st.sampled_from([0.2, 3.0, 20.0]))
def test_none_is_overtaken_beyond_the_bound_and_all_end(history: list[list[dict[str, Any]]], target_ms: float) -> None:
    walk = Walk(target_ms)
    latest: dict[str, int] = {}
    for step in range(5000):
        for number, drawn in enumerate(history[step] if step < len(history) else ()):
            answer = drawn.pop("answer")
            walk.arrive(call(f"{step}-{number}", **drawn), answer)
        for one, came in walk.came.items():
            if step == came + (BATCH_BOUND if one.hints.batch else BOUND) and one.left:
                before = [other for other in walk.came if other.wait_number < one.wait_number]
                tokens = one.left + sum(other.left for other in before)
                answers = sum(walk.answers[other] for other in walk.came)
                latest[one.name] = step + ceil(tokens / FLOOR) + len(before) + answers
        walk.run()
        assert all(walk.step <= latest.get(one.name, inf) for one in walk.came if one.left)
        if step >= len(history) and not walk.came:
            return
    raise AssertionError("some did not end")


def a_better_one_waits(**given: Any) -> tuple[Walk, Call, Call]:
    """A long prompt of class batch is being computed, and an interactive call has come."""
    walk = Walk(**given)
    long = walk.arrive(call("long", 5000, batch=True))
    assert walk.run() == {"long": STEP_TOKENS}
    return walk, long, walk.arrive(call("better", 40))


def test_it_begins_at_once() -> None:
    walk, _, _ = a_better_one_waits()
    assert walk.run() == {"long": FLOOR, "better": 40}


def rows(walk: Walk, steps: int) -> list[int]:
    return [walk.run().get("long", 0) for _ in range(steps)]


def test_one_that_the_engine_turns_away_costs_one_step_in_sixteen() -> None:
    walk, _, better = a_better_one_waits(bounds=(1000, 1000))
    walk.turned_away = better
    found = rows(walk, 33)
    assert [step for step, tokens in enumerate(found) if tokens < 20] == [0, 16, 32]


def test_nobody_makes_way_for_one_that_finds_no_room() -> None:
    walk, _, _ = a_better_one_waits()
    walk.room = False
    assert rows(walk, 5) == [STEP_TOKENS] * 5
    walk.room = True
    assert walk.run() == {"long": FLOOR, "better": 40}


def test_a_resume_prefill_of_any_length_is_one_while_nobody_decodes() -> None:
    """The resume budget is 256 tokens; those that wait and those that are computed are told apart anew as that changes."""
    walk = Walk()
    walk.policy.decodes = 1
    waits = call("waits", 400, 500)
    walk.arrive(waits)
    assert waits.key is not None
    assert not waits.key.cold
    walk.policy._follow_decodes(1)
    assert waits.key.cold
    walk.policy._follow_decodes(0)
    assert not waits.key.cold
    walk.policy.admit(waits, 500)
    assert waits.served_as is RESUME
    walk.policy._follow_decodes(1)
    assert waits.served_as is COLD
    walk.policy._follow_decodes(0)
    assert waits.served_as is RESUME


def test_one_that_has_its_kv_goes_before_a_worse_one() -> None:
    """It was copied back from host memory. It needs a place, and no KV blocks."""
    walk, long, better = a_better_one_waits()
    walk.waiting.remove(better)
    walk.policy.restores(better)
    walk.policy.plan(0, 0, STEP_TOKENS, PLACES - 1, False)
    assert walk.policy._order.standing(long, False).ahead == 0, "not all is there"
    walk.policy.is_restored(better)
    walk.policy.plan(0, 0, STEP_TOKENS, 0, False)
    assert walk.policy._order.standing(long, False).ahead == 0, "there is no place"
    walk.policy.plan(0, 0, STEP_TOKENS, PLACES - 1, False)
    assert walk.policy._order.standing(long, False).ahead == 40


def test_one_whose_kv_comes_back_is_overdue_after_as_many_steps() -> None:
    walk, _, better = a_better_one_waits()
    walk.waiting.remove(better)
    walk.policy.restores(better)
    walk.policy.begin_step(walk.step + BOUND)
    walk.policy.is_restored(better)
    walk.policy.admit(better, 0)
    assert place(better).urgency == Urgency.OVERDUE


def test_a_resume_prefill_leaves_a_shorter_one_its_share_of_the_resume_budget() -> None:
    walk = Walk()
    longer, shorter = (walk.arrive(call(name, left, 400)) for name, left in (("longer", 200), ("shorter", 50)))
    for one in (longer, shorter):
        walk.policy.admit(one, 400)
    assert StepOrder([longer, shorter], inf).standing(longer, False) == Standing(50, True, False, False, 50)
