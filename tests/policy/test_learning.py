"""What the controller makes of measured steps, to the digit: feedback, admission, calibration, and the budgets that follow."""

from typing import Any

import pytest

from vllm_agentserve.policy.budget import UNLIMITED
from vllm_agentserve.policy.controller import BudgetController, BudgetLimits
from vllm_agentserve.policy.latency import StepModel
from vllm_agentserve.policy.phase import Phase

COLD, RESUME = Phase.COLD_PREFILL, Phase.RESUME_PREFILL
CHUNKS = [(COLD, 64, 1000), (RESUME, 8, 3000)]


class KnownModel(StepModel):
    """A decode step takes 8 ms, a token of a chunk 0.1 ms, a thousand tokens of context 1 ms; it writes down its lessons."""

    def __init__(self, predicts: float = 0.0) -> None:
        super().__init__()
        self.predicts = predicts
        self.lessons: list[tuple[Any, ...]] = []

    @property
    def knows_prefill(self) -> bool:
        return True

    def decode_ms(self, sequences: int, context: int) -> float:
        return 8.0 + sequences + context / 1000 if sequences else 0.0

    def chunk_ms(self, tokens: int, context: int, first: bool = True) -> float:
        return 0.1 * tokens + context / 1000

    def tokens_within(self, budget_ms: float, context: int, first: bool = True) -> int:
        return int(10 * (budget_ms - context / 1000) + 1e-6)

    def learn_decode(self, sequences: int, context: int, duration_ms: float) -> None:
        self.lessons.append((sequences, context, duration_ms))

    def learn_prefill(self, sequences: int, context: int, chunks: Any, duration_ms: float) -> float:
        self.lessons.append((sequences, context, chunks, duration_ms))
        return self.predicts


class Trust:
    """Writes down what was tried."""

    def __init__(self) -> None:
        self.tried = False
        self.tries: list[tuple[Any, ...]] = []

    def tried_alone(self, chunks: Any, ratio: float) -> None:
        self.tries.append(("alone", chunks, ratio))

    def tried_beside_decodes(self, chunks: Any, ratio: float) -> None:
        self.tries.append(("beside", chunks, ratio))


def controller(predicts: float = 0.0, depth: int = 1, **limits: Any) -> BudgetController:
    made = BudgetController(BudgetLimits(**{"tpot_slo_ms": 40.0} | limits), depth)
    for regime in (made.whole, made.shared):
        regime.model = KnownModel(predicts)
        regime.trust = Trust()  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(
    ("limits", "start", "measured_ms", "gain", "resume_tokens"),
    [
        ({}, 250, 42.0, 0.95 / 1.05, 187),
        ({}, 250, 80.0, 0.95 * 0.93, 187),
        ({}, 40, 80.0, 0.95 * 0.93, 32),
        ({}, 250, 40.0, 0.95, 250),
        ({"resume_budget_max_tokens": 20}, 20, 80.0, 0.95 * 0.93, 20),
        ({"lower_threshold": 0.5}, 250, 20.0, 0.95, 250),
        ({}, 250, 36.0, 0.95 * 1.05, 312),
        ({"lower_threshold": 0.99}, 250, 39.2, 0.95 / 0.98, 312),
        ({}, 1000, 36.0, 0.95 * 1.05, 1024),
    ],
)
def test_feedback_to_the_digit(limits: dict, start: int, measured_ms: float, gain: float, resume_tokens: int) -> None:
    made = controller(**limits)
    made.resume_tokens = start
    made._feedback(measured_ms)
    assert made.gain == pytest.approx(gain)
    assert made.resume_tokens == resume_tokens
    assert isinstance(made.resume_tokens, int)


def test_gain_has_bounds_and_the_start_is_known() -> None:
    made = controller()
    assert (made.gain, made.resume_tokens, made.slow_steps, made.tpot.ewma) == (0.95, 256, 0, 0.0)
    assert made.whole.admission_ms == made.shared.admission_ms == 0.0
    for _ in range(30):
        made._feedback(1000.0)
    assert (made.gain, made.resume_tokens) == (0.4, 32)
    for _ in range(50):
        made._feedback(1.0)
    assert (made.gain, made.resume_tokens) == (1.15, 1024)


def test_a_single_slow_step_of_sixteen_does_not_move_it() -> None:
    """The 0.9 quantile of sixteen: the second longest."""
    made = controller()
    for took in [60.0] + 15 * [38.0]:
        made.observe(took, took, 4, 1000, CHUNKS)
    assert made.gain == 0.95
    for took in [60.0, 60.0] + 14 * [38.0]:
        made.observe(took, took, 4, 1000, CHUNKS)
    assert made.gain == pytest.approx(0.95 * 0.93)


@pytest.mark.parametrize(
    ("gain", "predicts", "depth", "took", "counts"),
    [
        (0.95, 0.0, 1, 32.2, False),
        (0.95, 0.0, 1, 32.4, True),
        (0.5, 0.0, 1, 18.0, True),
        (1.1, 0.0, 1, 33.0, False),
        (1.1, 0.0, 1, 35.0, True),
        (0.95, 33.0, 1, 20.0, True),
        (0.95, 20.0, 2, 5.0, True),
        (0.95, 0.0, 2, 17.0, True),
        (0.95, 0.0, 2, 15.0, False),
    ],
)
def test_only_full_steps_count(gain: float, predicts: float, depth: int, took: float, counts: bool) -> None:
    made = controller(predicts, depth)
    made.gain = gain
    made.observe(took, took, 4, 1000, CHUNKS)
    assert len(made._mixed) == counts


@pytest.mark.parametrize(
    ("depth", "intervals", "admission_ms"),
    [
        (1, [20.0], 3.0),
        (1, [20.0, 12.0], 2.7),
        (1, [5.0], 0.0),
        (1, [20.0, 0.0], 0.0),
        (1, [1000.0], 6.0),
        (2, [1000.0], 3.0),
    ],
)
def test_what_an_admission_takes(depth: int, intervals: list[float], admission_ms: float) -> None:
    made = controller(10.0, depth)
    for interval in intervals:
        made.observe(interval, interval, 4, 1000, CHUNKS, admitted=True)
        made.observe(900.0, 900.0, 4, 1000, CHUNKS, admitted=False)
    assert made.whole.admission_ms == pytest.approx(admission_ms)
    assert made.shared.admission_ms == 0.0
    budgets = [made.plan(2, 2000, 4096, colds=True, admits=admits).prefill_ms for admits in (False, True)]
    assert budgets[0] - budgets[1] == pytest.approx(admission_ms)


def test_who_learns_what_from_a_mixed_step() -> None:
    for beside in (False, True):
        made = controller(depth=2)
        made.observe(70.0, 50.0, 4, 1000, CHUNKS, beside_lane=beside)
        learns, other = (made.shared, made.whole) if beside else (made.whole, made.shared)
        assert learns.model.lessons == [(4, 1000, CHUNKS, 50.0)]
        assert learns.trust.tries == [("beside", CHUNKS, 2.5)]  # type: ignore[attr-defined]
        assert not other.model.lessons
        assert (made.tpot.ewma, made.slow_steps) == (100.0, 1)


@pytest.mark.parametrize(("sequences", "interval"), [(0, None), (0, 9.0), (4, None)])
def test_steps_without_streams_teach_until_there_are_others(sequences: int, interval: float | None) -> None:
    made = controller(depth=2)
    made.observe(70.0, interval, sequences, 1000, CHUNKS)
    assert made.whole.model.lessons == [(sequences, 1000, CHUNKS, 70.0)]
    assert made.whole.trust.tries == [("alone", CHUNKS, 3.5)]  # type: ignore[attr-defined]
    made.whole.trust.tried = True
    made.observe(70.0, interval, sequences, 1000, CHUNKS)
    assert len(made.whole.model.lessons) == 1
    assert not len(made._mixed)


def test_steps_of_decodes() -> None:
    made = controller(depth=2, tpot_slo_ms=None, tpot_factor=3.0, tpot_uncalibrated_ms=50.0)
    made.observe(10.0, None, 4, 1000, None)
    made.observe(10.0, 10.0, 4, 0, None)
    assert (made.whole.model.lessons, made.target_ms) == ([], 50.0)
    made.observe(10.0, 11.0, 4, 1000, None, beside_lane=True)
    assert (made.shared.model.lessons, made.target_ms) == ([(4, 1000, 11.0)], 50.0)
    for interval in (10.0, 30.0, 12.0):
        made.observe(interval, interval, 4, 1000, None)
    assert made.whole.model.lessons == [(4, 1000, 10.0), (4, 1000, 30.0), (4, 1000, 12.0)]
    assert made.target_ms == pytest.approx(3.0 * 24.0)  # the median of 20, 60, 24


def test_a_target_of_a_millisecond_is_the_least() -> None:
    made = controller(tpot_slo_ms=None, tpot_factor=2.0)
    made.observe(0.1, 0.1, 4, 1000, None)
    assert made.target_ms == 1.0


@pytest.mark.parametrize(("interval", "slow"), [(40.0, 0), (44.0, 0), (44.1, 1)])
def test_slow_steps_are_those_above_the_upper_threshold(interval: float, slow: int) -> None:
    made = controller(upper_threshold=1.1)
    for _ in range(2):
        made.observe(interval, interval, 4, 1000, None)
    assert made.slow_steps == 2 * slow


def test_windows_look_back_as_far_as_they_say() -> None:
    made = controller(tpot_slo_ms=None)
    for _ in range(300):
        made.observe(10.0, 10.0, 4, 1000, None)
    assert (len(made.tpot), len(made._alone)) == (256, 64)
    for _ in range(15):
        made.observe(90.0, 90.0, 4, 1000, CHUNKS)
    assert len(made._mixed) == 15
    made.observe(90.0, 90.0, 4, 1000, CHUNKS)
    assert len(made._mixed) == 0


def test_budgets_to_the_digit() -> None:
    made = controller(prefill_floor_tokens=5, chunk_granularity_tokens=4)
    step = made.plan(2, 2000, 4096, resumes=True, colds=True, waiting_resume_tokens=100)
    # 40 ms x 0.95, less 8 + 2 + 2 for the decodes.
    assert step.prefill_ms == pytest.approx(26.0)
    assert (step.tokens, step.resume_tokens, step.reserved_tokens) == (4096, 256, 100)
    assert (step.rules.floor_tokens, step.rules.granularity, step.other_tokens) == (5, 4, 2)
    assert (step.model, step.trust) == (made.whole.model, made.whole.trust)
    step = made.plan(2, 2000, 4096, colds=True, beside_lane=True)
    assert (step.model, step.trust) == (made.shared.model, made.shared.trust)


@pytest.mark.parametrize(
    ("max_tokens", "colds", "waiting", "resume_tokens", "reserved"),
    [
        (4096, True, 1000, 256, 256),
        (4096, False, 1000, 4096, 1000),
        (300, True, 1000, 256, 150),
        (300, False, 1000, 300, 150),
        (4096, True, 0, 256, 0),
    ],
)
def test_what_is_kept_for_resume_prefills(
    max_tokens: int, colds: bool, waiting: int, resume_tokens: int, reserved: int
) -> None:
    step = controller().plan(2, 2000, max_tokens, resumes=True, colds=colds, waiting_resume_tokens=waiting)
    assert (step.resume_tokens, step.reserved_tokens) == (resume_tokens, reserved)


def test_nobody_decodes_and_one_kind_of_prefill() -> None:
    made = controller(prefill_floor_tokens=5)
    step = made.plan(0, 0, 4096, colds=True)
    assert (step.prefill_ms, step.tokens, step.resume_tokens, step.reserved_tokens) == (UNLIMITED, 4096, 4096, 0)
    assert (step.rules.floor_tokens, step.rules.granularity, step.other_tokens, step.trust) == (5, 1, 0, None)
    both = made.plan(0, 0, 4096, colds=True, resumes=True)
    assert (both.prefill_ms, both.trust) == (pytest.approx(38.0), None)


def test_prefill_has_a_share_where_decodes_miss_the_target() -> None:
    step = controller(tpot_slo_ms=10.0).plan(32, 0, 4096, colds=True)
    assert step.prefill_ms == pytest.approx(10.0)  # a quarter of 40


@pytest.mark.parametrize(
    ("sequences", "context", "tokens", "before", "rate"),
    [
        # 26 ms are left of 38: halfway through the prompt, at 1000 + 500 tokens, that is a chunk of 245 in 12 + 24.5 + 1.5 ms
        (2, 2000, 1000, 1000, 245 / 38.0 * 1000),
        # a prompt of 100 tokens is one chunk: 12 + 10 + 0.05 ms
        (2, 2000, 100, 0, 100 / 22.05 * 1000),
        # no time is left: the floor of 16 tokens, in 12 + 1.6 + 100 ms
        (2, 2000, 1000, 99_500, 16 / 113.6 * 1000),
        (2, 2000, 0, 0, 1 / 12.1 * 1000),
    ],
)
def test_how_fast_steps_read_a_prompt(sequences: int, context: int, tokens: int, before: int, rate: float) -> None:
    assert controller().prefill_rate(sequences, context, tokens, before) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("tokens", "before", "rate"),
    [
        (1000, 3000, 256 / 29.1 * 1000),  # 25.6 + 3.5 ms
        (100, 0, 100 / 10.05 * 1000),
        (0, 0, 1 / 0.1 * 1000),
    ],
)
def test_how_fast_the_device_reads_a_prompt(tokens: int, before: int, rate: float) -> None:
    assert controller().device_rate(tokens, before) == pytest.approx(rate)


def test_nothing_is_known_of_a_prompt_at_first() -> None:
    made = BudgetController(BudgetLimits(tpot_slo_ms=40.0))
    assert made.prefill_rate(2, 2000, 100, 0) is None
    assert made.device_rate(100, 0) is None


def test_a_chunk_that_takes_no_time_still_has_a_rate() -> None:
    made = controller()
    made.whole.model.chunk_ms = lambda tokens, context, first=True: 0.0  # type: ignore[method-assign]
    assert made.device_rate(100, 0) == pytest.approx(100 / 0.01 * 1000)
