"""The target that nobody asked for: streams that decode weighed against prompts that wait."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_agentserve.policy.budget import UNLIMITED, TargetTrade
from vllm_agentserve.policy.call import Backlog
from vllm_agentserve.policy.controller import BudgetController, BudgetLimits
from vllm_agentserve.policy.latency import StepModel
from vllm_agentserve.policy.phase import Phase

TRADE = TargetTrade(weight=1.0, stock_share=0.4)


@pytest.mark.parametrize(
    ("streams", "backlog", "read_ms", "expected"),
    [
        # nobody waits
        (4, Backlog(), 0.0, 45.0),
        # one prompt of 300 ms beside sixteen streams: 9 + sqrt(300 x 9 / 16) = 22 ms, so the floor
        (16, Backlog(1, 1500), 300.0, 45.0),
        # the same prompt beside one stream: 9 + sqrt(300 x 9)
        (1, Backlog(1, 1500), 300.0, 9.0 + 51.9615),
        # the same beside four, when it has waited for two seconds: 9 + sqrt(2300 x 9 / 4)
        (4, Backlog(1, 1500, 2000.0), 300.0, 9.0 + 71.9375),
        # ten prompts beside three streams: as long as it may be, 0.4 of 400 ms
        (3, Backlog(10, 20_000), 4000.0, 160.0),
        # Some have no place: the whole step of stock vLLM, and no more.
        (3, Backlog(20, 40_000, crowded=True), 8000.0, 400.0),
        (4, Backlog(1, 1500, 2000.0, crowded=True), 300.0, 9.0 + 71.9375),
    ],
    ids=["nobody", "many streams", "one stream", "waited", "backlog", "crowded", "one, crowded"],
)
def test_the_trade_to_the_digit(streams: int, backlog: Backlog, read_ms: float, expected: float) -> None:
    assert TRADE.target_ms(45.0, 9.0, streams, backlog, read_ms, 400.0) == pytest.approx(expected)


def test_what_mixing_takes_is_on_top_of_the_limit_and_counts_with_the_decodes() -> None:
    # Ten prompts: 0.4 of the other 380 ms, and the 20 ms.
    assert TRADE.target_ms(45.0, 9.0, 3, Backlog(10, 20_000), 4000.0, 400.0, 20.0) == pytest.approx(172.0)
    # One beside one stream: 29 + sqrt(300 x 29)
    assert TRADE.target_ms(45.0, 9.0, 1, Backlog(1, 1500), 300.0, 400.0, 20.0) == pytest.approx(29.0 + 93.2738)
    assert TRADE.stretch_ms(170.0, 400.0, 20.0) == pytest.approx(2.0)
    assert TRADE.stretch_ms(170.0, 400.0) == 0.0


amount = st.floats(0.0, 1e5)


@given(
    floor=st.floats(1.0, 500.0),
    decodes=st.floats(0.1, 300.0),
    streams=st.integers(1, 1000),
    prompts=st.integers(0, 1000),
    read=amount,
    waited=amount,
    stock=amount,
    more=st.integers(1, 100),
)
def test_more_who_wait_never_tighten_it_and_more_streams_never_loosen_it(
    floor: float, decodes: float, streams: int, prompts: int, read: float, waited: float, stock: float, more: int
) -> None:
    def target(streams: int = streams, prompts: int = prompts, read: float = read, waited: float = waited) -> float:
        return TRADE.target_ms(floor, decodes, streams, Backlog(prompts, 100 * prompts, waited), read, stock)

    now = target()
    assert math.isfinite(now)
    assert floor <= now <= max(floor, 0.4 * stock)
    assert target(streams=streams + more) <= now
    for larger in (target(prompts=prompts + more), target(read=read + more), target(waited=waited + more)):
        assert larger >= now


class Known(StepModel):
    """Steps of 9 ms, and 0.2 ms per prompt token."""

    knows_prefill = True  # type: ignore[assignment]

    def decode_ms(self, sequences: int, context: int) -> float:
        return 9.0 if sequences else 0.0

    def chunk_ms(self, tokens: int, context: int, first: bool = True) -> float:
        return 0.2 * tokens

    def tokens_within(self, budget_ms: float, context: int, first: bool = True) -> int:
        return max(int(budget_ms * 5 + 1e-6), 0)

    def learn_decode(self, *_: object) -> None:
        pass

    def learn_prefill(self, *_: object) -> float:
        return 0.0


def controller(**limits: float) -> BudgetController:
    made = BudgetController(BudgetLimits(first_chunk_tokens=8192, **limits))  # type: ignore[arg-type]
    made.whole.model = Known()
    made.gain = 1.0
    for _ in range(64):
        made.observe(9.0, 9.0, 4, 1000, None)
    return made


MANY = Backlog(10, 20_000)


def test_a_target_that_was_given_holds_whoever_waits() -> None:
    made = controller(tpot_slo_ms=40.0)
    for backlog in (Backlog(), MANY, Backlog(1000, 10**6, 1e6)):
        step = made.plan(3, 1000, 2048, colds=True, backlog=backlog)
        assert step.target_ms == 40.0
        assert step.prefill_ms == pytest.approx(31.0)


def test_without_one_a_backlog_gets_longer_steps_and_resume_prefills_their_share() -> None:
    made = controller()
    alone = made.plan(16, 1000, 2048, resumes=True, colds=True, backlog=Backlog(1, 500))
    many = made.plan(3, 1000, 2048, resumes=True, colds=True, backlog=MANY)
    assert alone.target_ms == pytest.approx(45.0)
    assert many.target_ms == pytest.approx(0.55 * (9.0 + 0.2 * 2048))
    assert many.prefill_ms == pytest.approx(many.target_ms - 9.0)
    assert many.resume_tokens == 1024, "256 x 230 / 45, and at most resume_budget_max_tokens"
    some = made.plan(10, 1000, 2048, resumes=True, colds=True, backlog=Backlog(2, 1000))
    assert 45.0 < some.target_ms < 150.0
    assert some.resume_tokens == int(256 * some.target_ms / 45.0)
    assert made.step_target_ms == some.target_ms
    assert made.target_ms == pytest.approx(45.0)
    assert made.plan(0, 0, 2048, colds=True, backlog=MANY).prefill_ms == UNLIMITED


def test_a_step_is_longer_where_that_ends_a_prompt() -> None:
    """45 ms, less 9 for the decodes: 180 tokens. 270 take 63 ms, within one and a half targets; 320 take 73: two chunks."""
    backlog = Backlog(1, 300)
    made = controller(chunk_granularity_tokens=1)
    for wanted, granted in ((180, 180), (270, 270), (320, 160)):
        step = made.plan(16, 1000, 2048, colds=True, backlog=backlog)
        assert step.stretch_ms == pytest.approx(22.5)
        assert step.finishes(wanted, 0) is (wanted == granted)
        assert step.grant(Phase.COLD_PREFILL, wanted, 0) == granted
        assert step.target_ms == pytest.approx(67.5 if granted == 270 else 45.0)
    asked = controller(tpot_slo_ms=45.0).plan(16, 1000, 2048, colds=True, backlog=backlog)
    assert asked.stretch_ms == 0.0
    assert asked.grant(Phase.COLD_PREFILL, 270, 0) < 200


def test_a_prompt_of_a_few_steps_is_cut_into_equal_chunks() -> None:
    """Steps of 180 tokens: 500 are three chunks of 167 and not 180, 180 and 140, each in one of the sizes of steps; 2000 are more
    than four, and cut as they come. With a target that was given nothing changes."""
    backlog = Backlog(1, 500)
    for wanted, first in ((320, 160), (500, 176), (2000, 176)):
        step = controller(chunk_granularity_tokens=1).plan(16, 1000, 2048, colds=True, backlog=backlog)
        assert step.grant(Phase.COLD_PREFILL, wanted, 0) == first
    made, left, chunks = controller(chunk_granularity_tokens=8), 410, []
    while left:
        chunks.append(made.plan(16, 1000, 2048, colds=True, backlog=backlog).grant(Phase.COLD_PREFILL, left, 0))
        left -= chunks[-1]
    assert chunks == [144, 266]
    asked = controller(tpot_slo_ms=45.0, chunk_granularity_tokens=1).plan(16, 1000, 2048, colds=True, backlog=backlog)
    assert asked.grant(Phase.COLD_PREFILL, 320, 0) == 176


def test_no_step_is_stretched_beyond_the_limit() -> None:
    assert TRADE.stretch_ms(45.0, 400.0) == pytest.approx(22.5)
    assert TRADE.stretch_ms(150.0, 400.0) == pytest.approx(10.0)
    assert TRADE.stretch_ms(45.0, 50.0) == 0.0


def test_steps_are_judged_by_the_target_they_were_planned_for() -> None:
    """Sixteen steps as long as planned, four times the target: the feedback law holds, and the region does not shrink."""
    made = controller()
    gain, resumes = made.gain, made.resume_tokens
    for _ in range(made.CONTROL_STEPS):
        budget = made.plan(3, 1000, 2048, colds=True, backlog=MANY)
        tokens = budget.grant(Phase.COLD_PREFILL, 20_000, 0)
        took = 0.97 * budget.target_ms
        made.observe(took, took, 3, 1000, [(Phase.COLD_PREFILL, tokens, 0)], budget=budget)
    assert (made.gain, made.resume_tokens) == (gain, resumes)
    assert made.whole.trust.tokens_over(0) > 2048


def test_a_constant_backlog_has_a_constant_target() -> None:
    made = controller()
    targets = {made.plan(5, 1000, 2048, colds=True, backlog=Backlog(3, 3000, 100.0)).target_ms for _ in range(50)}
    assert len(targets) == 1


def test_before_anything_is_known_of_prompts_the_target_is_the_calibrated_one() -> None:
    made = BudgetController(BudgetLimits())
    assert made.plan(3, 1000, 2048, colds=True, backlog=MANY).target_ms == 50.0
