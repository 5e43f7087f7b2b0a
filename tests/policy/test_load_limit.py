"""The limit of load control: when it comes and goes, and from what it is decided."""

from dataclasses import replace
from math import exp, inf

import pytest

from tests.support.load_server import Measured
from vllm_agentserve.policy.claims import AHEAD, Claims
from vllm_agentserve.policy.load_limit import COMES, GOES, Demand, Limit, Room
from vllm_agentserve.policy.tier import UnmeasuredTier
from vllm_agentserve.policy.turn_means import TurnMeans
from vllm_agentserve.policy.turn_rate import Forecast, TurnCost, hit_ratio, turns_per_second

GAP_S = 1.0


def claims(programs: float, tokens: float) -> Claims:
    """Of programs that want so many tokens each, now and later."""
    of_all = (programs * tokens,) * len(AHEAD)
    return Claims(programs, of_all, of_all)


def demand(under_way: int, waiting: int = 0, tokens: float = 1000.0, surely: float | None = None) -> Demand:
    there = claims(under_way, tokens)
    return Demand(there, there.now if surely is None else surely, waiting, there + claims(waiting, tokens))


def limit(room: Room | None = None, read_s: float = 0.4, decode_s: float = 0.3, parts: float = 1.0) -> Limit:
    """A cache of 10,000 tokens, 9500 of them of use, and turns that read a thousand tokens in `read_s`, 100 of them new."""
    turns = TurnMeans()
    turns.answered(read_s, 1000, decode_s)
    turns.new_tokens.add(100.0)
    turns.parts.add(parts)
    return Limit(room or Room(10_000), turns)


def test_before_it_is_decided_there_is_none() -> None:
    """A first call that might not fit waits for others that come with it."""
    one = limit()
    assert (one.none, one.reason, one.weighed, one.better_if_more) == (True, "fits", None, True)
    assert one.fitting_tokens == 10_000
    assert limit(Room(10_000, UnmeasuredTier(30_000))).fitting_tokens == 30_000


def test_there_is_none_where_all_fit() -> None:
    one = limit()
    one.decide(0.0, demand(11), GAP_S)
    assert (one.none, one.tokens, one.reason, one.weighed) == (True, inf, "fits", None)
    one.decide(1.0, demand(12), GAP_S)
    assert (one.none, one.reason) == (False, "model")
    one.decide(2.0, demand(11), GAP_S)
    assert (one.none, one.reason, one.better_if_more) == (True, "fits", True)


def test_what_was_weighed() -> None:
    """Thirty programs, calls with 0.8 of their contexts of 1000 tokens: 0.04 s to read what is new, 0.32 s to read it again."""
    one = limit(parts=0.8)
    one.decide(0.0, demand(5, 25), GAP_S)
    weighed = one.weighed
    assert weighed is not None
    turn = TurnCost(GAP_S, 0.3, 0.04, 0.32)
    assert weighed.turn.read_s == pytest.approx(turn.read_s)
    assert weighed.turn.again_s == pytest.approx(turn.again_s)
    assert (weighed.turn.gap_s, weighed.turn.decode_s, weighed.turn.restore_s) == (GAP_S, 0.3, 0.0)
    assert weighed.programs == 30
    assert weighed.without == pytest.approx(turns_per_second(30, turn, 0.0, 9500 / 800))
    assert weighed.limited == pytest.approx(turns_per_second(9.5, turn, 1.0))
    assert one.tokens == pytest.approx(9500)


@pytest.mark.parametrize(("gap_s", "comes", "stays"), [(1.0, True, True), (6.0, False, False)])
def test_it_comes_at_nine_tenths_of_the_turns_and_goes_at_eight(gap_s: float, comes: bool, stays: bool) -> None:
    fresh, there = limit(), limit()
    there.decide(0.0, demand(5, 25), 0.1)
    assert not there.none
    for one, expected in ((fresh, comes), (there, stays)):
        one.decide(1.0, demand(5, 25), gap_s)
        assert one.none is not expected
        assert one.reason == ("model" if expected else "faster without")
        weighed = one.weighed
        assert weighed is not None
        assert (weighed.limited > weighed.without * (COMES if one is fresh else GOES)) is expected


def test_between_these_it_stays_as_it_is() -> None:
    gaps = [gap / 20 for gap in range(20, 120)]
    ratios = {}
    for gap_s in gaps:
        one = limit()
        one.decide(0.0, demand(5, 25), gap_s)
        assert one.weighed is not None
        ratios[gap_s] = one.weighed.limited / one.weighed.without
    between = [gap_s for gap_s, ratio in ratios.items() if GOES < ratio <= COMES]
    assert between
    for gap_s in between:
        fresh, there = limit(), limit()
        there.decide(0.0, demand(5, 25), 0.1)
        for one in (fresh, there):
            one.decide(1.0, demand(5, 25), gap_s)
        assert (fresh.none, there.none) == (True, False)


def test_it_is_decided_four_times_a_second() -> None:
    one = limit()
    assert one.due(0.0, 100.0, 1.0)
    one.decide(0.0, demand(12), GAP_S)
    assert not one.none
    assert not one.due(0.24, 50_000.0, 50.0)
    assert one.due(0.25, 0.0, 0.0)


def test_it_is_decided_at_once_where_contexts_no_longer_fit() -> None:
    one = limit()
    one.decide(0.0, demand(10), GAP_S)
    assert not one.due(0.1, 11_000.0, 10.0)
    assert one.due(0.1, 11_001.0, 10.0)


def test_and_where_there_is_none_once_a_quarter_more_programs_are_known() -> None:
    one = limit()
    one.decide(0.0, demand(10, 10), 30.0)
    assert one.reason == "faster without"
    assert not one.due(0.1, 50_000.0, 25.0)
    assert one.due(0.1, 50_000.0, 25.1)


@pytest.mark.parametrize(
    ("gap_s", "waiting", "surely", "more"),
    [(5.0, 9, None, True), (60.0, 9, None, False), (5.0, 9, 9500.0, True), (5.0, 9, 9501.0, False)],
)
def test_whether_there_would_be_one_if_many_more_came(
    gap_s: float, waiting: int, surely: float | None, more: bool
) -> None:
    """Not where contexts that are needed for sure fill the cache already."""
    one = limit()
    one.decide(0.0, demand(4, waiting, surely=surely), gap_s)
    assert one.reason == "faster without"
    assert one.better_if_more is more


@pytest.mark.parametrize("waiting", [0, 1, 60])
def test_where_those_under_way_find_nothing_it_only_helps_those_that_wait(waiting: int) -> None:
    """Contexts of 1.6 times what is of use: of sixteen programs nobody finds anything, with a limit or without."""
    one = limit()
    one.decide(0.0, demand(16, waiting), GAP_S)
    assert one.none is not (waiting > 0)
    weighed = one.weighed
    assert weighed is not None
    if waiting:
        now = turns_per_second(16, weighed.turn, 0.0, 9.5)
        later = turns_per_second(min(waiting, 9.5), weighed.turn, 1.0)
        assert weighed.limited == pytest.approx((16 + waiting) / (16 / now + waiting / later))
    else:
        assert weighed.limited == 0.0
    fresh = limit()
    fresh.decide(0.0, demand(16, waiting, surely=15_199.0), GAP_S)
    assert fresh.weighed is not None
    assert fresh.weighed.limited == pytest.approx(turns_per_second(9.5, weighed.turn, 1.0))


def test_a_limit_is_weighed_for_what_is_likely() -> None:
    """With contexts of 2000 tokens four programs fit, which give too few turns, and with contexts of 1600 six do."""
    most, guessed = claims(16, 2000.0), claims(16, 1600.0)
    for chosen in (most, guessed):
        one = limit(decode_s=0.1, parts=0.5)
        everybody = Claims(16, most.ahead, chosen.ahead)
        one.decide(0.0, Demand(Claims(), 0.0, 16, everybody), 3.0)
        assert (one.reason == "model") is (chosen is guessed)


def test_a_program_that_is_larger_than_the_cache_is_not_limited() -> None:
    one = limit()
    one.decide(0.0, demand(1, 1, tokens=12_000.0), GAP_S)
    assert (one.none, one.reason) == (True, "faster without")
    assert one.weighed is not None
    assert one.weighed.limited == 0.0


@pytest.mark.parametrize(("error", "moves"), [(0.09, False), (0.11, True), (-0.11, True)])
def test_how_much_of_the_cache_is_of_use_follows_what_was_found(error: float, moves: bool) -> None:
    room = Room(10_000)
    claimed = 1.3 * room.tokens
    room.correct(hit_ratio(1.3) + error, claimed)
    assert room.share == pytest.approx(0.95 * exp(0.02 * error) if moves else 0.95)


def test_its_bounds() -> None:
    room = Room(10_000)
    for _ in range(100):
        room.correct(1.0, 100_000.0)
    assert (room.share, room.tokens) == (1.15, 11_500)
    for _ in range(100):
        room.correct(0.0, 100.0)
    assert room.share == 0.85


def test_host_memory_counts_as_far_as_it_is_larger_than_the_cache() -> None:
    assert [Room(10_000, UnmeasuredTier(tokens)).kept_tokens for tokens in (0, 9_999, 25_000)] == [
        10_000,
        10_000,
        25_000,
    ]
    room = Room(10_000, UnmeasuredTier(25_000))
    # 24,000 tokens are found in 23,750 of use, in either memory.
    room.correct(1.0, 24_000.0)
    assert (room.tokens, room.share) == (9_500, 0.95)


@pytest.mark.parametrize(("token_ms", "fits"), [(0.199, True), (0.201, False)])
def test_all_fit_where_contexts_come_back_in_half_the_time_of_reading_them(token_ms: float, fits: bool) -> None:
    """Reading takes 0.4 ms a token."""
    one = limit(Room(10_000, Measured(30_000, token_ms)))
    one.decide(0.0, demand(5, 20), GAP_S)
    assert (one.reason == "fits") is fits
    assert one.fitting_tokens == (30_000 if fits else 10_000)


@pytest.mark.parametrize(("tier", "restore_s"), [(UnmeasuredTier(20_000), 0.04), (Measured(20_000, 0.05), 0.05)])
def test_what_a_restore_takes(tier: UnmeasuredTier | Measured, restore_s: float) -> None:
    """A tenth of reading the context again until it is known."""
    one = limit(Room(10_000, tier))
    one.decide(0.0, demand(5, 25), GAP_S)
    assert one.weighed is not None
    assert one.weighed.turn.restore_s == pytest.approx(restore_s)


def test_limits_up_to_the_host_memory_are_tried() -> None:
    """With gaps of 4 s nine programs leave the engine idle, and 28 do not."""
    one = limit(Room(10_000, Measured(30_000, 0.01)), decode_s=0.1)
    one.decide(0.0, demand(5, 95), 4.0)
    assert one.reason == "model"
    assert 9_500 < one.tokens <= 0.95 * 30_000


FORECAST = Forecast(30.0, 30_000.0, 9_500.0, 9_500.0, TurnCost(GAP_S, 0.3, 0.04, 0.4), 9.5)


def test_a_forecast_without_a_limit() -> None:
    assert FORECAST.footprint == 1000.0
    assert FORECAST.without() == turns_per_second(30, FORECAST.turn, 0.0, 9.5)
    few = replace(FORECAST, programs=10.0, most=12_000.0)
    assert few.without() == turns_per_second(10, few.turn, hit_ratio(12_000 / 9_500), 9.5)
    assert few.without(2.0) == turns_per_second(20, few.turn, 0.0, 9.5)


def test_a_forecast_with_a_limit() -> None:
    assert FORECAST.limited() == (turns_per_second(9.5, FORECAST.turn, 1.0), 9_500.0)
    # Nobody is kept waiting by a limit that is higher than what they want.
    few = replace(FORECAST, programs=6.0, most=6_000.0)
    assert few.limited()[1] == pytest.approx(0.6 * 9_500)
    assert few.limited(2.0) == (turns_per_second(9.5, few.turn, 1.0), 9_500.0)
    large = replace(FORECAST, programs=2.0, most=24_000.0)
    assert large.limited() == (0.0, 0.0)


def test_a_forecast_with_host_memory() -> None:
    turn = replace(FORECAST.turn, gap_s=4.0, restore_s=0.01)
    behind = replace(FORECAST, programs=100.0, most=100_000.0, kept=28_500.0, turn=turn)
    # No more calls run at once than contexts fit into the cache, wherever the others are.
    assert behind.limited()[0] > replace(behind, room=2.0).limited()[0]
    assert FORECAST.limited() == replace(FORECAST, room=2.0).limited()
    best, tokens = behind.limited()
    assert tokens in [share * 28_500.0 for share in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
    found = hit_ratio(tokens / 9_500)
    assert best == pytest.approx(turns_per_second(tokens / 1000, turn, found, 9.5, 1.0 - found))
    assert behind.without() == turns_per_second(100, turn, 0.0, 9.5)
