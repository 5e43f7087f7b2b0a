"""The budget of a step and the controller behind it: tables, properties, and a simulated engine with noise."""

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.simulated_engine import SimulatedEngine
from tests.support.step_models import FlatModel
from vllm_agentserve.policy.budget import UNLIMITED, ChunkRules, StepBudget, TrustRegion
from vllm_agentserve.policy.controller import BudgetController, BudgetLimits
from vllm_agentserve.policy.phase import Phase

COLD, RESUME = Phase.COLD_PREFILL, Phase.RESUME_PREFILL


def budget(prefill_ms: float, **given: int) -> StepBudget:
    rules = ChunkRules(given.pop("floor_tokens", 16), given.pop("granularity", 8))
    settings = {"tokens": 4096, "resume_tokens": 256, "reserved_tokens": 0}
    return StepBudget(FlatModel(), rules, prefill_ms, **(settings | given))


@pytest.mark.parametrize(
    ("prefill_ms", "given", "asked", "granted"),
    [
        # nobody decodes: the whole step, then nothing
        (UNLIMITED, {}, [(COLD, 6000), (COLD, 100)], [4096, 0]),
        # time for 100 tokens: rounded down to a step size, and the second prompt waits
        (10.0, {}, [(COLD, 6000), (COLD, 50)], [96, 0]),
        # a prompt that ends within the time is not rounded, and what is left goes to the next
        (10.0, {}, [(COLD, 37), (COLD, 6000)], [37, 59]),
        # the resume prefill comes first where it is asked first
        (10.0, {}, [(RESUME, 40), (COLD, 6000)], [40, 56]),
        # a cold chunk leaves room for resume prefills that are asked later
        (10.0, {"reserved_tokens": 40}, [(COLD, 6000), (RESUME, 40)], [60 // 8 * 8, 40]),
        # resume prefills stop at their own budget; the cold one goes on
        (20.0, {"resume_tokens": 64}, [(RESUME, 60), (RESUME, 60), (COLD, 6000)], [60, 4, 128]),
        # no time at all: both kinds advance by the floor, once
        (0.0, {}, [(RESUME, 100), (COLD, 6000), (COLD, 6000), (RESUME, 5)], [16, 16, 0, 0]),
        (-30.0, {}, [(COLD, 6000)], [16]),
        # fewer tokens than the floor are left
        (0.0, {}, [(COLD, 5)], [5]),
        # the engine takes fewer tokens than the time allows
        (100.0, {"tokens": 50}, [(COLD, 6000)], [48]),
        # the decodes count for the size of the step: 7 + 97 = 104
        (10.0, {"other_tokens": 7}, [(COLD, 6000)], [97]),
        # above 128 tokens sizes are coarser: 8 of them to an octave
        (26.0, {}, [(COLD, 6000)], [256]),
        (25.5, {}, [(COLD, 6000)], [240]),
    ],
)
def test_grants(prefill_ms: float, given: dict, asked: list, granted: list) -> None:
    step = budget(prefill_ms, **given)
    assert [step.grant(phase, wanted, context=1000) for phase, wanted in asked] == granted
    assert sum(tokens for _, tokens, _ in step.granted) == sum(granted)


def test_what_cannot_be_cut_is_charged() -> None:
    step = budget(10.0)
    step.charge(COLD, 80, 0)
    assert step.grant(COLD, 6000, 0) == 16  # time for 20 is left


def controller(**limits: float) -> BudgetController:
    return BudgetController(BudgetLimits(**limits))  # type: ignore[arg-type]


def taught(target: float, steps: int = 2, **engine: float) -> tuple[BudgetController, SimulatedEngine]:
    made = controller(tpot_slo_ms=target)
    simulated = SimulatedEngine(made, **engine)  # type: ignore[arg-type]
    simulated.decode(50)
    for _ in range(steps):
        list(simulated.cold_prefill(6000))
        simulated.decode(50)
    return made, simulated


def cold_chunk(made: BudgetController, sequences: int, context: int = 0, decode_context: int = 2000) -> int:
    return made.plan(sequences, decode_context, 4096, colds=True).grant(COLD, 1_000_000, context)


def test_without_decodes_the_budget_is_the_whole_step() -> None:
    made, _ = taught(20.0)
    assert made.plan(0, 0, 4096, colds=True).grant(COLD, 9000, 0) == 4096
    assert made.plan(0, 0, 4096, resumes=True, waiting_resume_tokens=300).grant(RESUME, 300, 4000) == 300


def test_without_decodes_a_cold_prompt_still_makes_room_for_a_resume() -> None:
    made, _ = taught(20.0)
    step = made.plan(0, 0, 4096, resumes=True, colds=True, waiting_resume_tokens=60)
    assert step.grant(COLD, 9000, 0) < 1000
    assert step.grant(RESUME, 60, 4000) > 0


@given(
    target=st.floats(1.0, 500.0),
    sequences=st.integers(0, 256),
    context=st.integers(0, 200_000),
    max_tokens=st.integers(1, 8192),
    resumes=st.integers(0, 5000),
    colds=st.booleans(),
    prompt=st.integers(1, 100_000),
    done=st.integers(0, 100_000),
)
def test_a_cold_prefill_always_advances_and_never_past_the_bounds(
    target: float, sequences: int, context: int, max_tokens: int, resumes: int, colds: bool, prompt: int, done: int
) -> None:
    made, _ = TAUGHT[0]
    made._set_target(target)
    step = made.plan(sequences, context, max_tokens, resumes > 0, colds, resumes)
    granted = step.grant(COLD, prompt, done)
    assert min(prompt, 16) <= granted <= max(min(prompt, max_tokens), 16)
    if resumes:
        assert 0 < step.grant(RESUME, resumes, done) <= max(min(resumes, max_tokens), 16)


TAUGHT = [taught(40.0)]


@given(a=st.floats(2.0, 400.0), b=st.floats(2.0, 400.0), context=st.integers(0, 16_000))
def test_a_larger_target_never_gives_a_smaller_chunk(a: float, b: float, context: int) -> None:
    made, _ = TAUGHT[0]
    chunks = []
    for target in sorted((a, b)):
        made._set_target(target)
        chunks.append(cold_chunk(made, 4, context))
    assert chunks[0] <= chunks[1]


@given(a=st.integers(0, 200_000), b=st.integers(0, 200_000), target=st.floats(5.0, 100.0))
def test_more_context_never_gives_a_larger_chunk(a: int, b: int, target: float) -> None:
    made, _ = TAUGHT[0]
    made._set_target(target)
    assert cold_chunk(made, 4, min(a, b)) >= cold_chunk(made, 4, max(a, b))


@given(st.lists(st.floats(0.01, 5_000.0), min_size=1, max_size=200), st.floats(5.0, 100.0))
@settings(max_examples=50)
def test_feedback_stays_within_its_bounds(ratios: list[float], target: float) -> None:
    made = controller(tpot_slo_ms=target)
    for ratio in ratios:
        took = ratio * target
        made.observe(took, took, 4, 1000, [(COLD, 64, 1000)])
    low, high = made.GAIN_RANGE
    assert low <= made.gain <= high
    assert 32 <= made.resume_tokens <= 1024


@pytest.mark.parametrize(
    ("ratio", "gain", "resumes"),
    [(1.5, "shrinks", "shrinks"), (0.96, "holds", "holds"), (0.9, "grows", "grows"), (0.5, "holds", "holds")],
    ids=["above", "between", "below", "nothing to do"],
)
def test_feedback_law(ratio: float, gain: str, resumes: str) -> None:
    made = controller(tpot_slo_ms=40.0)
    before = made.gain, made.resume_tokens
    for _ in range(made.CONTROL_STEPS):
        made.observe(40.0 * ratio, 40.0 * ratio, 4, 1000, [(COLD, 64, 1000)])
    for was, is_now, wanted in zip(before, (made.gain, made.resume_tokens), (gain, resumes), strict=True):
        assert {"shrinks": is_now < was, "holds": is_now == was, "grows": is_now > was}[wanted]


def test_feedback_measured_higher_never_gives_more() -> None:
    gains = []
    for ratio in (0.9, 0.95, 1.0, 1.03, 1.1, 1.5, 3.0):
        made = controller(tpot_slo_ms=40.0)
        for _ in range(3 * made.CONTROL_STEPS):
            made.observe(40.0 * ratio, 40.0 * ratio, 4, 1000, [(COLD, 64, 1000)])
        gains.append(made.gain)
    assert gains == sorted(gains, reverse=True)


@pytest.mark.parametrize("target", [20.0, 40.0, 100.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_first_cold_prefill_already_fits(target: float, seed: int) -> None:
    made = controller(tpot_slo_ms=target)
    engine = SimulatedEngine(made, seed=seed, admission=0.0)
    engine.decode(50)
    took = [ms for ms, _, _ in engine.cold_prefill(8192)]
    assert max(took) <= 1.4 * target  # the noise alone reaches 1.25
    assert statistics.median(took) <= 1.05 * target


@pytest.mark.parametrize("target", [20.0, 40.0, 100.0])
@pytest.mark.parametrize(("noise", "hiccup"), [(0.0, 0.0), (0.08, 0.0), (0.08, 0.005)])
def test_it_converges_to_the_target(target: float, noise: float, hiccup: float) -> None:
    made, engine = taught(target, steps=4, noise=noise, hiccup=hiccup, seed=3)
    took = sorted(ms for ms, _, _ in engine.cold_prefill(16_384))
    assert 0.8 * target <= statistics.median(took) <= 1.05 * target
    assert took[int(0.95 * len(took))] <= 1.2 * target


def test_it_follows_an_engine_that_becomes_slower() -> None:
    made, engine = taught(40.0)
    engine.per_token, engine.per_token_context = 2 * engine.per_token, 2 * engine.per_token_context
    list(engine.cold_prefill(8192))
    took = sorted(ms for ms, _, _ in engine.cold_prefill(8192))
    assert took[int(0.95 * len(took))] <= 1.25 * 40.0


def test_a_target_below_the_decode_step_still_lets_prompts_through() -> None:
    made, engine = taught(2.0, steps=0)
    steps = list(engine.cold_prefill(4096))
    assert len(steps) <= 4096 / 16


def test_the_target_is_calibrated_from_decode_steps_alone() -> None:
    made = controller(tpot_factor=5.0, tpot_uncalibrated_ms=50.0)
    assert made.target_ms == 50.0
    engine = SimulatedEngine(made, noise=0.0)
    engine.decode(40, sequences=4)
    assert made.target_ms == pytest.approx(5 * engine.true_ms(4, 0, 0))
    list(engine.cold_prefill(2048))
    assert made.target_ms == pytest.approx(5 * engine.true_ms(4, 0, 0))


def test_pipeline_parallelism_divides_the_target() -> None:
    one, two = (BudgetController(BudgetLimits(tpot_slo_ms=40.0), depth) for depth in (1, 2))
    budgets = [made.plan(4, 1000, 4096, colds=True).prefill_ms for made in (one, two)]
    assert budgets[1] == pytest.approx(budgets[0] / 2)


def test_trust_grows_only_in_the_direction_that_was_tried() -> None:
    region = TrustRegion(first=32)
    at_start = region.tokens_over(0)
    for _ in range(30):
        tokens = region.tokens_over(8000)
        region.tried_beside_decodes([(COLD, tokens, 8000)], ratio=0.3)
    assert region.tokens_over(8000) > 100
    assert at_start < region.tokens_over(0) < 5 * region.tokens_over(8000)
    grown = region.tokens_over(8000)
    region.tried_beside_decodes([(COLD, grown, 8000)], ratio=2.0)
    assert region.tokens_over(8000) < grown
