"""How far chunks are trusted beyond what was tried, and what a step's budget charges for them, to the digit."""

import pytest

from vllm_agentserve.policy.budget import UNLIMITED, ChunkRules, StepBudget, TrustRegion
from vllm_agentserve.policy.latency import StepModel
from vllm_agentserve.policy.phase import Phase

COLD, RESUME = Phase.COLD_PREFILL, Phase.RESUME_PREFILL


def region(tokens: float, attended: float, first: int = 32) -> TrustRegion:
    made = TrustRegion(first)
    made._tokens, made._attended = tokens, attended
    return made


def edges(of: TrustRegion) -> tuple[float, float]:
    return of._tokens, of._attended


def test_the_first_chunk() -> None:
    """p / T + p (c + p / 2) / A = 1 with T = 32 and A = 64,000."""
    made = TrustRegion(32)
    assert made.tried is False
    assert edges(made) == (32.0, 64_000.0)
    assert (made.tokens_over(0), made.tokens_over(2000), made.tokens_over(6000)) == (31, 15, 7)
    assert region(400.0, 1e5).tokens_over(0) == 262


@pytest.mark.parametrize(
    ("chunks", "ratio", "expected"),
    [
        ([(COLD, 100, 900)], 0.9, (100.0, 95_000.0)),
        ([(COLD, 100, 900)], 1.0, (50.0, 64_000.0)),
        ([(COLD, 200, 900), (RESUME, 100, 1950)], 1.0, (150.0, 200_000.0)),
        ([(COLD, 200, 1900), (RESUME, 100, 1950)], 4.0, (37.5, 75_000.0)),
        ([(COLD, 10, 100)], 0.5, (32.0, 64_000.0)),
    ],
)
def test_what_fitted_alone_may_be_tried_beside_decodes(chunks: list, ratio: float, expected: tuple) -> None:
    made = TrustRegion(32)
    made.tried_alone(chunks, ratio)
    assert edges(made) == pytest.approx(expected)
    assert made.tried is False


@pytest.mark.parametrize(
    ("ratio", "stride"),
    [(0.4, 2.0), (0.5, 1.25), (0.8, 1.25), (0.9, 1.0), (1.0, 1.0), (1.1, 1 / 1.1), (1.09, 1.0), (2.0, 0.5)],
)
def test_a_step_at_the_edge_moves_it(ratio: float, stride: float) -> None:
    """Half of what is trusted in both directions: 200 of 400 tokens, 80,000 of 160,000 token pairs."""
    made = region(400.0, 160_000.0)
    made.tried_beside_decodes([(COLD, 200, 300)], ratio)
    assert made.tried is True
    assert edges(made) == pytest.approx((400.0 * stride, 160_000.0 * stride))


@pytest.mark.parametrize(
    ("tokens", "context", "ratio", "expected"),
    [
        # less than three quarters of the way to the edge: nothing is learned, good or bad
        (100, 750, 2.0, (400.0, 320_000.0)),
        (100, 750, 0.1, (400.0, 320_000.0)),
        # exactly three quarters is enough
        (100, 1550, 2.0, (400.0, 160_000.0)),
        # almost all of it in tokens: only that edge moves
        (300, 50, 0.1, (800.0, 320_000.0)),
        # almost all of it in context
        (20, 14_990, 0.1, (400.0, 640_000.0)),
        # no further than twice what was tried: 100 tokens are a quarter of 400
        (100, 1950, 0.1, (400.0, 640_000.0)),
        (100, 2950, 0.8, (400.0, 400_000.0)),
    ],
)
def test_only_the_direction_of_the_step_was_tried(tokens: int, context: int, ratio: float, expected: tuple) -> None:
    made = region(400.0, 320_000.0)
    made.tried_beside_decodes([(COLD, tokens, context)], ratio)
    assert edges(made) == pytest.approx(expected)


def test_edges_move_no_further_than_twice_what_was_tried() -> None:
    made = region(400.0, 320_000.0)
    made.tried_beside_decodes([(COLD, 160, 920)], 0.4)  # 0.4 and 0.5 of the way
    assert edges(made) == pytest.approx((640.0, 640_000.0))
    made = region(400.0, 320_000.0)
    made.tried_beside_decodes([(COLD, 200, 540)], 0.4)  # 0.5 and 0.4
    assert edges(made) == pytest.approx((800.0, 512_000.0))
    made = region(400.0, 320_000.0)
    made.tried_beside_decodes([(COLD, 320, 240)], 0.4)  # 0.8, and no more than half of that
    assert edges(made) == pytest.approx((800.0, 320_000.0))


def test_edges_stay_beyond_the_first_chunk() -> None:
    made = TrustRegion(32)
    for _ in range(5):
        made.tried_beside_decodes([(COLD, 32, 1984)], 10.0)
    assert edges(made) == (32.0, 64_000.0)


class FirstCosts(StepModel):
    """0.1 ms per token and 0.001 ms per token of context; the first chunk of a step 2 ms more."""

    def chunk_ms(self, tokens: int, context: int, first: bool = True) -> float:
        return (2.0 if first else 0.0) + 0.1 * tokens + 0.001 * context

    def tokens_within(self, budget_ms: float, context: int, first: bool = True) -> int:
        return max(int(10 * (budget_ms - (2.0 if first else 0.0) - 0.001 * context) + 1e-6), 0)


def budget(prefill_ms: float, **given: int) -> StepBudget:
    rules = ChunkRules(given.pop("floor_tokens", 4), given.pop("granularity", 1))
    settings = {"tokens": 4096, "resume_tokens": 256, "reserved_tokens": 0}
    return StepBudget(FirstCosts(), rules, prefill_ms, **(settings | given))


def test_only_the_first_chunk_of_a_step_pays_for_mixing() -> None:
    step = budget(22.0)
    assert step.grant(RESUME, 50, 0) == 50
    assert step.prefill_ms == pytest.approx(15.0)
    assert step.grant(COLD, 50, 1000) == 50
    assert step.prefill_ms == pytest.approx(9.0)
    # 80 would fit: the step has 176 tokens in all
    assert step.grant(COLD, 500, 1000) == 76
    assert step.granted == [(RESUME, 50, 0), (COLD, 50, 1000), (COLD, 76, 1000)]


def test_the_first_chunk_makes_room_for_a_reserve_that_will_not_be_first() -> None:
    """22 ms less 2 for being first, 3 for 20 tokens over 1000, and 1 for its own context: 160 tokens."""
    step = budget(22.0, reserved_tokens=20)
    assert step.grant(COLD, 500, 1000) == 160
    assert step.grant(RESUME, 20, 1000) == 20
    assert (step.reserved_tokens, step.resume_tokens, step.tokens) == (0, 236, 4096 - 180)
    step = budget(22.0, reserved_tokens=20)
    assert step.grant(RESUME, 5, 0) == 5
    assert step.reserved_tokens == 15
    # 19.5 ms are left, 1.5 + 1 kept, 1 for its own context: 160, and the step has 160 tokens in all
    assert step.grant(COLD, 500, 1000) == 155


def test_tokens_may_bind_before_time_does() -> None:
    assert budget(1000.0, tokens=94, reserved_tokens=30).grant(COLD, 500, 0) == 64
    assert budget(1000.0, tokens=96).grant(RESUME, 500, 0) == 96


def test_without_a_target_cold_prompts_leave_the_reserve_alone() -> None:
    step = budget(UNLIMITED, tokens=100, reserved_tokens=30)
    assert step.grant(COLD, 500, 0) == 70
    assert step.grant(RESUME, 500, 0) == 30
    assert budget(UNLIMITED, tokens=100, reserved_tokens=100, floor_tokens=16).grant(COLD, 500, 0) == 16
    assert budget(UNLIMITED, tokens=10, reserved_tokens=10, floor_tokens=16).grant(COLD, 500, 0) == 16


def test_a_chunk_of_one_token_counts_and_none_does_not() -> None:
    step = budget(2.1)
    assert step.grant(COLD, 1, 0) == 1
    assert step.grant(COLD, 5, 0) == 0
    assert step.granted == [(COLD, 1, 0)]
    assert (step.tokens, step.other_tokens) == (4095, 1)


def test_what_runs_anyway_is_charged_to_its_kind() -> None:
    step = budget(22.0, resume_tokens=60, reserved_tokens=40)
    step.charge(RESUME, 50, 2000)
    assert (step.resume_tokens, step.reserved_tokens) == (10, 0)
    assert step.prefill_ms == pytest.approx(22.0 - 2.0 - 5.0 - 2.0)
    assert step.granted == [(RESUME, 50, 2000)]


def test_small_steps_are_not_rounded() -> None:
    """Below sixteen tokens an eighth of an octave is less than a token."""
    assert budget(3.5).grant(COLD, 500, 0) == 15
    assert budget(3.7).grant(COLD, 500, 0) == 16
    assert budget(3.9).grant(COLD, 500, 0) == 18
