"""The simulator: it computes what it should on cases that can be done by hand, wastes nothing, and shows what policies do."""

import random
from typing import get_args

import pytest

from vllm_agentserve.bench.calls import CallShape, ProgramShape, forks, in_blocks, origin, scaled, tool_chain_s
from vllm_agentserve.bench.cost import SERVER_GPU as COST
from vllm_agentserve.bench.cost import StepCost
from vllm_agentserve.bench.programs import KINDS, draw_programs
from vllm_agentserve.policy.programs import ProgramTable
from vllm_agentserve.simulator.policies import figures, simulate
from vllm_agentserve.simulator.simulator import Order, Simulator

ORDERS = get_args(Order)
FLAT = StepCost(base=10.0, sequence=0.0, context=0.0, tokens=100.0, attended=0.0)
"""A step is 10 ms, a thousand prompt tokens are 100 ms more."""


def run(order: Order, programs: list[ProgramShape], slots: int = 1, cost: StepCost = FLAT) -> dict[str, float]:
    table = ProgramTable(order, quantum_ms=100.0) if order in ("plas", "atlas") else None
    return {one.name: one.seconds for one in Simulator(order, cost, slots, 1000, table).run(programs)}


def one(name: str, *calls: CallShape, at: float = 0.0) -> ProgramShape:
    return ProgramShape(name, at, calls)


@pytest.mark.parametrize("order", ORDERS)
def test_a_program_alone(order: Order) -> None:
    """500 prompt tokens in a step of 60 ms, which gives the first token; nine more at 10 ms; a tool; the same again."""
    first = CallShape(500, 0, 10)
    second = CallShape(500, 510, 10, 2.0, (0,))
    assert run(order, [one("p", first, second)])["p"] == pytest.approx(2 * 0.15 + 2.0)


def test_a_long_prompt_takes_as_many_steps_as_it_needs() -> None:
    assert run("fcfs", [one("p", CallShape(2500, 0, 1))])["p"] == pytest.approx(0.28)


@pytest.mark.parametrize("order", ORDERS)
def test_decodes_share_steps(order: Order) -> None:
    took = run(order, [one(name, CallShape(100, 0, 11)) for name in "ab"], slots=2)
    assert took == pytest.approx({"a": 0.13, "b": 0.13})


@pytest.mark.parametrize("order", ORDERS)
def test_threads_join(order: Order) -> None:
    """A fork into two calls that run together, and a call that waits for the slower one."""
    calls = (
        CallShape(100, 0, 1),
        CallShape(100, 0, 11, 0.0, (0,)),
        CallShape(100, 0, 21, 0.0, (0,)),
        CallShape(100, 0, 1, 0.0, (1, 2)),
    )
    assert run(order, [one("p", *calls)], slots=2)["p"] == pytest.approx(0.02 + 0.03 + 0.2 + 0.02)


def test_least_attained_service_lets_the_short_one_pass() -> None:
    """One slot, a program of ten calls and one of a single call that comes while the first works: optimal is to let it in
    at the next gap between two calls."""
    calls = [CallShape(100, 0, 50, 0.0, (n - 1,) if n else ()) for n in range(10)]
    programs = [one("long-1", *calls), one("long-2", *calls), one("short", CallShape(100, 0, 50), at=0.6)]
    first_come, least = run("stock", programs), run("plas", programs)
    assert least["short"] < first_come["short"]
    assert least["short"] == pytest.approx(0.9, abs=0.51)
    assert sum(least.values()) < sum(first_come.values())


def test_critical_paths_let_the_wide_program_go_on() -> None:
    """What threads did beside each other does not hold back the call that joins them."""
    wide = (
        *(CallShape(100, 0, 30) for _ in range(4)),
        CallShape(100, 0, 30, 0.0, (0, 1, 2, 3)),
    )
    chain = tuple(CallShape(100, 0, 30, 0.0, (n - 1,) if n else ()) for n in range(6))
    programs = [one("wide", *wide), *(one(f"chain-{n}", *chain) for n in range(4))]
    by_service, by_path = run("plas", programs, slots=2), run("atlas", programs, slots=2)
    assert by_path["wide"] <= by_service["wide"]


@pytest.mark.parametrize("count", [24, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", list(KINDS))
def test_every_program_ends_and_nothing_is_lost(order: Order, shape: str, count: int) -> None:
    programs = draw_programs(shape, count, 0.9, COST, 8, seed=1)
    ended = simulate(order, programs, COST, slots=8)
    assert sorted(one.name for one in ended) == sorted(one.name for one in programs)
    assert sum(one.tokens for one in ended) == sum(call.output for one in programs for call in one.calls)
    assert all(one.seconds > one.tools_s for one in ended)


@pytest.mark.parametrize("order", ORDERS)
def test_the_engine_never_idles_while_somebody_waits(order: Order) -> None:
    """One slot and no tools: whatever the order, the last one ends when all the work is done."""
    rng = random.Random(5)
    programs = [
        one(
            f"p{n}",
            *(CallShape(100, 0, rng.randint(1, 40), 0.0, (k - 1,) if k else ()) for k in range(rng.randint(1, 6))),
        )
        for n in range(30)
    ]
    work_s = sum(0.01 * call.output + 0.01 for program in programs for call in program.calls)
    assert max(run(order, programs).values()) == pytest.approx(work_s)


@pytest.mark.slow
def test_under_load_programs_first_beats_first_come_first_served() -> None:
    programs = draw_programs("mixed", 600, 0.95, COST, 16, seed=2)
    mean = {order: figures(simulate(order, programs, COST, slots=16))["mean"] for order in ORDERS}
    assert mean["plas"] < 0.8 * mean["fcfs"]
    assert mean["atlas"] < 0.8 * mean["fcfs"]
    assert mean["sjf-oracle"] <= 1.05 * mean["plas"]


def test_an_order_and_its_table_go_together() -> None:
    with pytest.raises(ValueError, match="order 'plas' goes with a program table"):
        Simulator("plas", FLAT, 1, 1000)
    with pytest.raises(ValueError, match="order 'fcfs' goes without a program table"):
        Simulator("fcfs", FLAT, 1, 1000, ProgramTable("plas"))


def test_the_tools_on_the_critical_path() -> None:
    calls = (
        CallShape(1, 0, 1, 0.5),
        CallShape(1, 0, 1, 2.0, (0,)),
        CallShape(1, 0, 1, 1.0, (0,)),
        CallShape(1, 0, 1, 0.25, (1, 2)),
    )
    assert tool_chain_s(one("p", *calls)) == 2.75


# What the simulator takes from the scheduler


def test_resume_prefills_go_before_cold_ones_but_not_in_stock() -> None:
    """One slot: while the first program decodes, a cold prompt and then the next turn of another program come."""
    programs = [
        one("first", CallShape(500, 0, 20)),
        one("cold", CallShape(500, 0, 20), at=0.02),
        one("resumed", CallShape(100, 800, 20), at=0.04),
    ]
    stock, ours = run("stock", programs), run("fcfs", programs)
    assert stock["cold"] < stock["resumed"]
    assert ours["resumed"] < ours["cold"]


def test_nobody_is_overtaken_for_ever() -> None:
    """One slot, resumed turns all the time: the cold prompt goes first once it has waited for so many steps."""
    stream = [one(f"resumed-{n}", CallShape(50, 800, 10), at=0.05 * n) for n in range(100)]
    programs = [*stream, one("cold", CallShape(500, 0, 5), at=0.2)]
    soon, late = (
        {ended.name: ended.seconds for ended in Simulator("fcfs", FLAT, 1, 1000, patience=steps).run(programs)}["cold"]
        for steps in (20, 100_000)
    )
    assert soon < 1.0 < late


def test_chunks_beside_decodes_are_cut_but_not_in_stock() -> None:
    """A stream of 10 ms a step; a prompt of 900 tokens would make one step of 100 ms, the target is 50 ms."""
    programs = [one("stream", CallShape(10, 0, 60)), one("prompt", CallShape(900, 0, 1), at=0.2)]
    stock, ours = run("stock", programs, slots=2), run("fcfs", programs, slots=2)
    assert ours["prompt"] > stock["prompt"] + 0.01
    assert stock["prompt"] == pytest.approx(0.1, abs=0.011)


def test_the_cache_keeps_full_blocks() -> None:
    calls = (CallShape(100, 0, 10), CallShape(50, 110, 10, 0.5, (0,)), CallShape(5, 33, 1, 0.0, (1,)))
    found = [(call.uncached, call.context) for call in in_blocks(calls, 32)]
    assert found == [(100, 0), (50 + 110 - 96, 96), (5 + 1, 32)]
    assert [(call.uncached, call.context) for call in in_blocks(calls, 1)] == [(100, 0), (51, 109), (6, 32)]


@pytest.mark.parametrize("shape", list(KINDS))
def test_scaled_programs_have_contexts_that_fit(shape: str) -> None:
    """Every prompt begins with the prompt and the answer of the call it goes on from, whatever the scale."""
    for scale in (1.0, 0.2, 0.01):
        for program in draw_programs(shape, 20, 0.9, COST, 4, seed=3, scale=scale):
            for index, call in enumerate(program.calls):
                before = origin(program.calls, index)
                if before is None:
                    assert (index, call.context) == (0, 0)
                else:
                    parent = program.calls[before]
                    assert call.context == parent.context + parent.uncached + parent.output


def test_scale_shrinks_lengths_and_tools() -> None:
    calls = KINDS["tools"](random.Random(1))
    small = scaled(calls, 0.5)
    assert [call.parents for call in small] == [call.parents for call in calls]
    assert [call.tool_s for call in small] == [call.tool_s / 2 for call in calls]
    assert all(abs(one.uncached - other.uncached / 2) <= 0.5 for one, other in zip(small, calls, strict=True))


def test_forks_are_told_from_turns() -> None:
    calls = KINDS["search"](random.Random(0))
    assert [forks(calls, index) for index in range(8)] == [False, *[True] * 5, False, True]
    assert [origin(calls, index) for index in range(8)] == [None, 0, 0, 0, 0, 0, 0, 6]


@pytest.mark.parametrize("shape", list(KINDS))
def test_another_load_is_the_same_programs_sooner_or_later(shape: str) -> None:
    slow, fast = (draw_programs(shape, 30, load, COST, 4, seed=1) for load in (0.4, 0.8))
    assert [one.calls for one in slow] == [one.calls for one in fast]
    assert [one.arrival_s for one in slow] == pytest.approx([2 * one.arrival_s for one in fast])
