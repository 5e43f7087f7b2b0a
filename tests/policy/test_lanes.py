"""The decisions about two lanes, as tables: who goes where and why, how the device is divided, which job next."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_agentserve.policy.preemption import Rank
from vllm_agentserve.policy.routes import LanePolicy, Prompt, Reason, Route, lanes_may_pay
from vllm_agentserve.policy.slots import (
    PATIENCE_CHUNKS,
    LaneRate,
    SlotChooser,
    Waiting,
    chunk_length,
    core_ladder,
    next_job,
)

# Routes


@pytest.mark.parametrize(
    ("prompt", "decodes", "in_flight", "answer"),
    [
        (Prompt(99), 4, 0, (Route.STEP, Reason.SHORT)),
        (Prompt(100), 4, 0, (Route.LANE, Reason.FORCED)),
        (Prompt(5000), 0, 0, (Route.STEP, Reason.NO_DECODES)),
        (Prompt(5000, eligible=False), 4, 0, (Route.STEP, Reason.INELIGIBLE)),
        (Prompt(5000), 1, 1, (Route.LANE, Reason.FORCED)),
        (Prompt(5000), 1, 2, (Route.HOLD, Reason.FORCED)),
        (Prompt(5000), 1, 9, (Route.HOLD, Reason.FORCED)),
        # Asked for is asked for, whatever would be faster.
        (Prompt(5000, step_rate=4000.0, lane_rate=1000.0), 1, 0, (Route.LANE, Reason.FORCED)),
    ],
)
def test_routes_when_lanes_are_asked_for(prompt: Prompt, decodes: int, in_flight: int, answer: tuple) -> None:
    assert LanePolicy(min_tokens=100, jobs=2).route(prompt, decodes, in_flight) == answer


@pytest.mark.parametrize(
    ("step_rate", "lane_rate", "in_flight", "answer"),
    [
        (None, None, 0, (Route.STEP, Reason.UNMEASURED)),
        (3000.0, None, 0, (Route.STEP, Reason.UNMEASURED)),
        (None, 2000.0, 0, (Route.STEP, Reason.UNMEASURED)),
        (3000.0, 2000.0, 0, (Route.STEP, Reason.STEP_FASTER)),
        (1000.0, 2000.0, 0, (Route.LANE, Reason.LANE_FASTER)),
        (1000.0, 2000.0, 2, (Route.HOLD, Reason.LANE_FASTER)),
        # A tenth slower is worth it: streams run at their own pace beside the lane.
        (2190.0, 2000.0, 0, (Route.LANE, Reason.LANE_FASTER)),
        (2210.0, 2000.0, 0, (Route.STEP, Reason.STEP_FASTER)),
    ],
)
def test_auto_takes_what_reads_the_prompt_faster(
    step_rate: float | None, lane_rate: float | None, in_flight: int, answer: tuple
) -> None:
    policy = LanePolicy(min_tokens=100, jobs=2, compares=True)
    assert policy.route(Prompt(5000, True, step_rate, lane_rate), 4, in_flight) == answer


def test_a_lane_that_failed_gets_nothing_until_one_is_started() -> None:
    policy = LanePolicy(min_tokens=1, jobs=1)
    policy.failed()
    assert policy.route(Prompt(9), 1, 0) == (Route.STEP, Reason.LANE_DOWN)
    policy.started()
    assert policy.route(Prompt(9), 1, 0) == (Route.LANE, Reason.FORCED)


@pytest.mark.parametrize(
    ("factor", "share", "pays"),
    [
        (None, 0.5, True),
        (5.0, 0.5, False),
        (5.0, 0.75, True),
        (2.0, 0.5, True),
        (3.0, 0.4, False),
        (1.2, 0.1, True),
    ],
)
def test_whether_a_lane_may_pay_at_all(factor: float | None, share: float, pays: bool) -> None:
    assert lanes_may_pay(factor, share) is pays


# Slots


@pytest.mark.parametrize(
    ("cores", "share", "decode"),
    [
        (2, None, [1]),
        (3, None, [2]),
        (4, None, [1, 2, 3]),
        (6, None, [1, 3, 4]),
        (16, None, [4, 8, 12]),
        (16, 0.3, [5]),
        (2, 0.95, [1]),
        (4, 0.05, [1]),
    ],
)
def test_core_ladder(cores: int, share: float | None, decode: list[int]) -> None:
    assert core_ladder(cores, share) == decode


def test_one_core_is_not_enough() -> None:
    with pytest.raises(ValueError, match="two lanes need two cores, there is 1"):
        core_ladder(1)


@given(st.integers(2, 256), st.one_of(st.none(), st.floats(0.05, 0.95)))
def test_both_lanes_have_a_core_on_every_slot(cores: int, share: float | None) -> None:
    ladder = core_ladder(cores, share)
    assert ladder == sorted(set(ladder))
    assert all(1 <= decode < cores for decode in ladder)


def settled(chooser: SlotChooser, step_ms: float, target_ms: float, steps: int = 8) -> int:
    for _ in range(steps):
        chooser.observe(step_ms)
        chooser.choose(target_ms)
    return chooser.slot


def test_the_chooser_begins_with_the_most_for_decode() -> None:
    assert SlotChooser([4, 8, 12]).slot == 2


def test_it_steps_down_only_when_a_proportional_loss_would_fit() -> None:
    # 20 ms on 12 cores would be 30 ms on 8, and 85 % of the target are the limit.
    assert settled(SlotChooser([4, 8, 12]), 20.0, 36.0) == 1
    assert settled(SlotChooser([4, 8, 12]), 20.0, 34.0) == 2


def test_it_goes_on_down_by_what_it_then_sees() -> None:
    chooser = SlotChooser([4, 8, 12])
    assert settled(chooser, 10.0, 40.0) == 1
    assert settled(chooser, 11.0, 40.0) == 0
    assert settled(chooser, 12.0, 40.0, steps=100) == 0


def test_it_steps_up_when_the_target_is_missed_and_does_not_come_back_at_once() -> None:
    chooser = SlotChooser([4, 12])
    assert settled(chooser, 5.0, 40.0) == 0
    assert settled(chooser, 39.0, 40.0) == 1
    assert settled(chooser, 5.0, 40.0, steps=500) == 1
    assert settled(chooser, 5.0, 40.0, steps=20) == 0


def test_one_slot_is_never_left() -> None:
    assert settled(SlotChooser([1]), 500.0, 10.0, steps=50) == 0
    assert settled(SlotChooser([1]), 0.1, 10.0, steps=50) == 0


def test_the_rate_of_the_lane_is_a_share_of_the_device_until_it_is_measured() -> None:
    rate = LaneRate(0.5)
    assert rate.tokens_per_s(None) is None
    assert rate.tokens_per_s(4000.0) == 2000.0
    rate.report(0, 1.0)
    rate.report(256, 0.0)
    assert rate.tokens_per_s(4000.0) == 2000.0
    rate.report(256, 0.1)
    assert rate.tokens_per_s(4000.0) == pytest.approx(2560.0)
    rate.report(256, 0.2)
    assert 1280.0 < (rate.tokens_per_s(None) or 0.0) < 2560.0


# Jobs


@pytest.mark.parametrize(
    ("waiting", "chosen"),
    [
        ([Waiting("a", False, 5000), Waiting("b", False, 4000)], "b"),
        ([Waiting("a", False, 5000), Waiting("b", True, 6000)], "b"),
        ([Waiting("a", True, 700), Waiting("b", True, 600)], "b"),
        ([Waiting("a", False, 500), Waiting("b", False, 500)], "a"),
        ([Waiting("a", False, 9000, PATIENCE_CHUNKS), Waiting("b", True, 10)], "a"),
        ([Waiting("a", False, 9000, PATIENCE_CHUNKS - 1), Waiting("b", True, 10)], "b"),
        # Class and level of the call go before that, but not before one that was overtaken for too long.
        ([Waiting("a", True, 100, rank=Rank(False, 1)), Waiting("b", False, 900)], "b"),
        ([Waiting("a", True, 100, rank=Rank(True, 0)), Waiting("b", False, 900, rank=Rank(False, 7))], "b"),
        ([Waiting("a", False, 900, 64, Rank(True, 7)), Waiting("b", True, 100)], "a"),
        # Among overdue ones the longest overtaken, or a hundred of a better class would keep one of a worse out for good.
        ([Waiting("a", True, 100, 64), Waiting("b", False, 900, 65, Rank(True, 7))], "b"),
    ],
)
def test_next_job(waiting: list[Waiting], chosen: str) -> None:
    assert next_job(waiting) == chosen


def test_nobody_waits() -> None:
    with pytest.raises(ValueError, match="empty"):
        next_job([])


@pytest.mark.parametrize(
    ("base", "units", "smallest", "tokens"),
    [(256, 1, 1, 256), (256, 2, 1, 512), (256, 12, 4, 768), (256, 7, 4, 448), (256, 5, 4, 320), (100, 2, 1, 192)],
)
def test_chunk_length(base: int, units: int, smallest: int, tokens: int) -> None:
    assert chunk_length(base, units, smallest) == tokens
    assert chunk_length(base, 1000 * units, smallest) == 8 * base // 64 * 64


def test_the_average_of_a_slot_begins_with_what_is_seen_there() -> None:
    """The mean of the first ten intervals, then a tenth of each."""
    chooser = SlotChooser([4, 8])
    for interval in (10.0, 20.0, 60.0):
        chooser.observe(interval)
    assert chooser._average_ms == pytest.approx(30.0)
    for _ in range(7):
        chooser.observe(30.0)
    chooser.observe(130.0)
    assert chooser._average_ms == pytest.approx(40.0)


def test_a_slot_at_its_limit_is_kept_and_one_that_would_be_at_it_is_taken() -> None:
    chooser = SlotChooser([4, 8, 16])
    chooser.slot = 1
    assert settled(chooser, 85.0, 100.0) == 1
    chooser = SlotChooser([4, 8])
    assert settled(chooser, 42.5, 100.0) == 0


def test_every_slot_is_judged_by_its_own_intervals() -> None:
    chooser = SlotChooser([4, 8, 16])
    assert settled(chooser, 10.0, 100.0) == 1
    for _ in range(7):
        chooser.observe(10.0)
        assert chooser.choose(100.0) == 1
    chooser.observe(10.0)
    assert chooser.choose(100.0) == 0


def test_a_report_of_one_token_counts() -> None:
    rate = LaneRate(0.5)
    rate.report(1, 0.5)
    assert rate.tokens_per_s(None) == 2.0
    rate.report(6, 0.5)
    assert rate.tokens_per_s(1000.0) == pytest.approx(2.0 + 0.2 * 10.0)


def test_a_prompt_that_has_waited_for_room_goes_through_steps() -> None:
    policy = LanePolicy(100, 2)
    assert policy.route(Prompt(500), 4, 2, True) == (Route.STEP, Reason.LANE_FULL)
    assert policy.route(Prompt(500), 4, 1, True) == (Route.LANE, Reason.FORCED)


def test_as_fast_as_steps_is_fast_enough() -> None:
    policy = LanePolicy(10, 2, compares=True)
    assert policy.route(Prompt(100, step_rate=110.0, lane_rate=100.0), 1, 0)[1] is Reason.LANE_FASTER
    assert policy.route(Prompt(100, step_rate=110.1, lane_rate=100.0), 1, 0)[1] is Reason.STEP_FASTER


@pytest.mark.parametrize(("units", "smallest", "tokens"), [(4, 4, 100), (3, 4, 100), (5, 4, 100), (6, 4, 128)])
def test_chunks_of_odd_lengths(units: int, smallest: int, tokens: int) -> None:
    length = chunk_length(100, units, smallest)
    assert length == tokens
    assert isinstance(length, int)


def test_ladders_are_whole_cores() -> None:
    assert all(isinstance(cores, int) for count in range(2, 20) for cores in core_ladder(count))
