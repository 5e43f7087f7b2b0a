"""What the lane learns of slots and of its own rate: stalls and wrong measurements do not last."""

import pytest

from vllm_agentserve.policy.routes import LanePolicy, Prompt, Reason
from vllm_agentserve.policy.slots import LaneRate, SlotChooser, chunk_alone


def settled(chooser: SlotChooser, step_ms: float, target_ms: float, steps: int = 8) -> int:
    for _ in range(steps):
        chooser.observe(step_ms)
        chooser.choose(target_ms)
    return chooser.slot


@pytest.mark.parametrize("every", [100, 400, 1000])
def test_a_stall_now_and_then_says_nothing_of_a_slot(every: int) -> None:
    chooser = SlotChooser([33, 66, 99])
    slots = []
    for number in range(8000):
        stall = 1000.0 if number % every == every - 1 else 0.0
        chooser.observe([14.0, 11.0, 10.0][chooser.slot] + stall)
        slots.append(chooser.choose(20.0))
    assert slots[1000:].count(1) == 7000


def test_intervals_that_stay_long_are_no_stall() -> None:
    chooser = SlotChooser([4, 12])
    assert settled(chooser, 5.0, 40.0) == 0
    settled(chooser, 5.0, 40.0)
    assert settled(chooser, 100.0, 40.0) == 1


def test_a_slot_that_is_too_small_again_and_again_is_tried_less_and_less() -> None:
    """In proportion the smallest slot would keep the target, and it does not. One interval in a hundred would be the p99."""
    chooser = SlotChooser([33, 66, 99])
    missed = 0
    for _ in range(20_000):
        interval = [40.0, 12.5, 8.0][chooser.slot]
        missed += interval > 30.0
        chooser.observe(interval)
        chooser.choose(30.0)
    assert missed < 100


def test_a_slot_that_suffices_after_all_is_as_good_as_new() -> None:
    chooser = SlotChooser([4, 12])
    for _ in range(3):
        settled(chooser, 5.0, 40.0, steps=5000)
        settled(chooser, 39.0, 40.0, steps=40)
        assert chooser.slot == 1
    settled(chooser, 5.0, 40.0, steps=520)
    assert chooser.slot == 0


def test_a_rate_that_was_wrong_once_is_not_wrong_for_ever() -> None:
    """The first chunk compiled a model: a hundred times too slow. No prompt goes to the lane, so nothing corrects it."""
    rate, policy = LaneRate(0.5), LanePolicy(512, 2, compares=True)
    rate.report(256, 33.6)
    tries = 0
    while policy.route(Prompt(5000, True, 300.0, rate.tokens_per_s(2000.0)), 4, 0)[1] is Reason.STEP_FASTER:
        rate.passed_over()
        tries += 1
        assert tries < 1000
    assert tries > 10, "and a lane that is slow is not tried with every prompt"
    for _ in range(20):
        rate.report(256, 0.256)
    assert rate.tokens_per_s(2000.0) == pytest.approx(1000.0, rel=0.05)


def test_a_rate_does_not_drift_beyond_the_share_of_the_device() -> None:
    rate = LaneRate(0.5)
    rate.report(1000, 1.0)
    for _ in range(10_000):
        rate.passed_over()
    assert rate.tokens_per_s(4000.0) == pytest.approx(2000.0)
    assert rate.tokens_per_s(100.0) == 1000.0
    assert rate.tokens_per_s(None) == 1000.0


def test_intervals_that_are_long_every_other_time_are_no_stalls() -> None:
    """10 and 100 ms in turns: 55 ms on average is no slot for a target of 40."""
    chooser = SlotChooser([4, 12])
    assert settled(chooser, 5.0, 40.0) == 0
    for number in range(60):
        chooser.observe(100.0 if number % 2 else 10.0)
        chooser.choose(40.0)
    assert chooser.slot == 1


def test_one_wrong_first_report_does_not_shut_the_lane_out_for_ever() -> None:
    """A lane of 600 tokens/s beside steps of 300, first reported with 6; its share of the device says 250."""
    rate, policy = LaneRate(0.25), LanePolicy(16, 2, compares=True)
    rate.report(60, 10.0)
    tried = 0
    for _ in range(4000):
        reason = policy.route(Prompt(4000, True, 300.0, rate.tokens_per_s(1000.0)), 2, 0)[1]
        if reason is Reason.STEP_FASTER:
            rate.passed_over()
        else:
            tried += 1
            rate.report(6000, 10.0)
    assert tried > 3000


@pytest.mark.parametrize(
    ("rate", "target_ms", "quiet_s", "tokens"),
    [
        # nobody was there for a while, or ever
        (None, 0.0, float("inf"), 4096),
        (30_000.0, 50.0, 10.0, 4096),
        # a stream was there: as long as a step may take
        (30_000.0, 50.0, 9.9, 1472),
        (30_000.0, 50.0, 0.0, 1472),
        (9_000.0, 30.0, 0.0, 256),
        (1_000_000.0, 50.0, 0.0, 4096),
        # never nothing
        (1_000.0, 10.0, 0.0, 64),
        # nothing known: a short one
        (None, 50.0, 0.0, 256),
        (30_000.0, 0.0, 0.0, 256),
        (30_000.0, float("inf"), 0.0, 256),
    ],
)
def test_a_chunk_alone_is_bounded_in_time(rate: float | None, target_ms: float, quiet_s: float, tokens: int) -> None:
    assert chunk_alone(1024, 4096, rate, target_ms, quiet_s) == tokens


@pytest.mark.parametrize(("base", "longest", "tokens"), [(128, 4096, 128), (1024, 100, 100)])
def test_a_first_chunk_alone_is_no_longer_than_any_other(base: int, longest: int, tokens: int) -> None:
    assert chunk_alone(base, longest, None, 50.0, 0.0) == tokens
    assert chunk_alone(base, longest, 1e9, 50.0, 0.0) == longest
