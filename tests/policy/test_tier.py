"""Load control of an engine with host memory behind its KV cache: who waits, and for what."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.load_server import BEGAN, Measured, fill, learned
from vllm_agentserve.policy.tier import UnmeasuredTier
from vllm_agentserve.policy.turn_rate import Forecast, TurnCost, turns_per_second

READ_MS = 0.2
"""Milliseconds to read a token, as `Server` says it."""


def test_nobody_is_held_where_all_contexts_come_back_from_host_memory() -> None:
    """Thirty programs that want 1608 tokens each, over a cache of 10,000."""
    server = learned(host=Measured(50_000, 0.02 * READ_MS))
    assert fill(server) == []
    report = server.load.report()
    assert (report.reason, report.limit_tokens, report.pool_tokens) == ("fits", None, 10_000)


def test_nor_while_nobody_knows_how_long_that_takes() -> None:
    server = learned(host=UnmeasuredTier(50_000))
    assert fill(server) == []
    assert server.load.report().reason == "fits"


@pytest.mark.parametrize("host_tokens", [0, 2_000, 10_000])
def test_host_memory_that_is_no_larger_than_the_cache_holds_copies_of_it(host_tokens: int) -> None:
    """Blocks are copied when they are full: the last used ones are in both."""
    server = learned(host=Measured(host_tokens, 0.02 * READ_MS))
    assert 30 - len(fill(server)) == BEGAN
    assert server.load.report().limit_tokens == pytest.approx(0.95 * 10_000)


def test_what_is_neither_in_the_cache_nor_in_host_memory_is_computed_again() -> None:
    """Room for two caches, thirty programs want five."""
    server = learned(host=Measured(20_000, 0.02 * READ_MS))
    held = fill(server)
    report = server.load.report()
    assert report.reason == "model"
    assert BEGAN <= 30 - len(held) < 2.5 * BEGAN
    assert report.limit_tokens is not None
    assert report.limit_tokens <= 0.95 * 20_000


def test_host_memory_that_is_slower_than_computing_again_does_not_let_more_begin() -> None:
    server = learned(host=Measured(50_000, 10 * READ_MS))
    assert 30 - len(fill(server)) == BEGAN
    assert server.load.report().reason == "model"


def test_what_comes_back_from_host_memory_was_found() -> None:
    """Twice the cache is under way and everything is found: nothing to correct. Without host memory, the cache would be larger
    than thought."""
    rooms = {}
    for tokens in (0, 40_000):
        server = learned(host=Measured(tokens, 0.02 * READ_MS))
        for index in range(12):
            server.arrive(f"new-{index}/0", f"new-{index}")
            server.begin(f"new-{index}/0")
            server.end(f"new-{index}/0")
        server.load.limit.tokens = 1e4
        server.now += 1.0
        for index in range(12):
            server.arrive(f"new-{index}/1", f"new-{index}", 1150)
            server.begin(f"new-{index}/1", 1050)
        rooms[tokens] = server.load.report().room
    assert rooms[40_000] == 0.95
    assert rooms[0] > 0.95


TURN = TurnCost(gap_s=1.0, decode_s=0.5, read_s=0.05, again_s=0.4, restore_s=0.1)


def test_a_restore_delays_its_call_and_leaves_the_engine_to_others() -> None:
    assert turns_per_second(4, TURN, 0.0, inf, 1.0) == turns_per_second(4, replace(TURN, gap_s=1.1), 1.0)
    assert turns_per_second(4, TURN, 0.5, inf, 0.5) == turns_per_second(4, replace(TURN, gap_s=1.05), 1.0)
    assert turns_per_second(4, TURN, 0.0, inf, 0.0) == turns_per_second(4, replace(TURN, restore_s=0.0), 0.0)


def test_restores_take_turns_on_their_way() -> None:
    slow = replace(TURN, restore_s=2.0)
    assert turns_per_second(1000, slow, 0.0, inf, 1.0) == pytest.approx(0.5)
    assert turns_per_second(1000, slow, 0.0, inf, 0.5) == pytest.approx(1.0)


def test_a_call_has_its_room_while_its_context_comes_back() -> None:
    assert turns_per_second(1000, TURN, 0.0, 2, 1.0) == pytest.approx(1 / ((0.5 + 0.05 + 0.1) / 2 + 0.05))


@settings(deadline=None)
@given(st.floats(1, 500), st.floats(0.1, 20), st.floats(0, 30), st.floats(0.001, 1), st.floats(0, 10), st.floats(0, 10))
def test_without_host_memory_nothing_is_restored(
    programs: float, pressure: float, gap: float, read: float, again: float, restore: float
) -> None:
    turn = TurnCost(gap, 0.5, read, again)
    forecast = Forecast(programs, pressure * 1e4, 1e4, 1e4, turn, 4.0)
    other = replace(forecast, turn=replace(turn, restore_s=restore))
    assert (forecast.without(), forecast.limited()) == (other.without(), other.limited())


@settings(deadline=None)
@given(st.floats(1, 500), st.floats(0.1, 20), st.floats(1, 20), st.floats(0, 30), st.floats(0.001, 1), st.floats(0, 10))
def test_host_memory_that_is_fast_never_costs_turns(
    programs: float, pressure: float, size: float, gap: float, read: float, again: float
) -> None:
    without = Forecast(programs, pressure * 1e4, 1e4, 1e4, TurnCost(gap, 0.5, read, again), 4.0)
    behind = replace(without, kept=size * 1e4)
    assert behind.without() >= without.without() * 0.999
    assert behind.limited()[0] >= without.limited()[0] * 0.999
