"""Load control in the simulator: it pays where contexts do not fit, costs nothing where they do, and nobody waits for ever."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_agentserve.policy.load import LoadControl
from vllm_agentserve.simulator import pressure
from vllm_agentserve.simulator.kv_blocks import KvBlocks
from vllm_agentserve.simulator.load_search import ENGINE, MEASURED, Cell, Machine, Programs, controlled, figures
from vllm_agentserve.simulator.pressure import Agent, Ends, FixedLimit, Gate, PressureEngine, Turn


def test_blocks_are_shared_and_the_longest_unused_goes_first() -> None:
    blocks = KvBlocks(4, 10)
    first = blocks.allocate(2)
    blocks.fill(first[0], "a0")
    blocks.fill(first[1], "a1")
    assert (blocks.free, blocks.hits(["a0", "a1", "a2"])) == (2, 2)
    shared = blocks.touch(["a0"])
    blocks.release(first)
    # The second block is free and cached, the first has another user.
    assert blocks.free == 3
    assert blocks.needed(["a0", "a1"], 2, 20) == 1
    assert blocks.needed(["a0", "a1"], 2, 35) == 3
    blocks.release(shared)
    assert blocks.free == 4
    # The end of a sequence goes before its beginning, blocks without contents go before all.
    blocks.allocate(3)
    assert blocks.hits(["a0", "a1"]) == 1
    blocks.allocate(1)
    assert blocks.hits(["a0"]) == 0


def test_a_block_without_contents_is_used_again_first() -> None:
    blocks = KvBlocks(3, 10)
    full, empty = blocks.allocate(1), blocks.allocate(1)
    blocks.fill(full[0], "a0")
    blocks.release(full)
    blocks.release(empty)
    assert blocks.allocate(1) == empty


def cell(ratio: float, gap_s: float, programs: int = 16, **more: object) -> Cell:
    machine = Machine("engine", ENGINE, round(43_008 / ratio), 128, 32, 2048)
    return Cell("", "", machine, Programs(programs, (6, 6), 1500, 200, 32, gap_s), (), seeds=1, **more)  # type: ignore[arg-type]


def without(case: Cell, seed: int = 0) -> dict[str, float]:
    return figures(case.machine.engine(FixedLimit()).run(case.traffic(seed)), 0.0)


@pytest.mark.parametrize("warm", ["same", "two-turns", "benchmark"])
def test_a_limit_that_gives_as_many_turns_is_chosen(warm: str) -> None:
    """Twice the KV cache, tools of 1 s, on the machine as measured: with eight programs under way the engine gives as many turns
    per second as without a limit, and sessions end a fifth sooner."""
    machine = Machine("measured", MEASURED, 21_504, 128, 32, 2048)
    case = Cell("", "", machine, Programs(16, (6, 6), 1500, 200, 32, 1.0), (), warm=warm)
    for seed in range(2):
        free, ours = without(case, seed), controlled(case, seed, "untold")
        assert ours["session_mean_s"] <= 0.83 * free["session_mean_s"]
        # Claims of programs that have ended without saying so lapse a second later.
        assert ours["session_p95_s"] <= 1.22 * free["session_p95_s"]


@pytest.mark.parametrize("gap_s", [0.2, 1.0, 5.0])
def test_where_all_fits_nothing_changes(gap_s: float) -> None:
    case = cell(1, gap_s)
    none, ours = without(case), controlled(case, 0)
    assert ours["session_mean_s"] == pytest.approx(none["session_mean_s"], rel=0.01)


@pytest.mark.parametrize("ends", ["told", "untold", "untrue"])
@pytest.mark.parametrize(
    ("ratio", "gap_s", "most"), [(2, 0.2, 0.55), (4, 0.2, 0.55), (2, 1.0, 0.75), (2, 5.0, 1.0), (4, 5.0, 1.0)]
)
def test_sessions_are_shorter_where_contexts_do_not_fit(ratio: float, gap_s: float, most: float, ends: Ends) -> None:
    case = cell(ratio, gap_s)
    none, ours = without(case), controlled(case, 0, ends)
    assert ours["session_mean_s"] <= 1.01 * most * none["session_mean_s"]
    assert ours["session_p95_s"] <= 1.03 * none["session_p95_s"]
    assert ours["makespan_s"] <= 1.03 * none["makespan_s"]


def test_one_shot_traffic_is_not_held() -> None:
    programs = Programs(200, (1, 1), 1500, 0, 32, 0.0, 10.0, told=False)
    case = replace(cell(4, 1.0), programs=programs)
    none, ours = without(case), controlled(case, 0)
    assert ours["session_mean_s"] == pytest.approx(none["session_mean_s"])


def test_one_shot_traffic_beside_agents_is_not_later() -> None:
    one_shots = Programs(64, (1, 1), 800, 0, 32, 0.0, 15.0, told=False)
    case = replace(cell(2, 1.0), one_shots=one_shots)
    none, ours = without(case), controlled(case, 0)
    assert ours["one_shot_mean_s"] <= 1.03 * none["one_shot_mean_s"]
    assert ours["session_mean_s"] <= 1.03 * none["session_mean_s"]


def adapted(gap_before_s: float, gap_s: float, ratio: float = 4) -> float:
    """Session mean relative to no control, of a server that knew another gap until now."""
    case = cell(ratio, gap_s)
    engine = case.machine.engine(case.machine.control())
    engine.run(cell(ratio, gap_before_s).programs.draw(99, "before"))
    engine.now_s += 10.0
    began = engine.now_s
    ours = figures(engine.run(case.traffic(0)), began)
    return ours["session_mean_s"] / without(case)["session_mean_s"]


def test_it_follows_other_gaps() -> None:
    """Four times longer and shorter than those it knows, and much more."""
    assert adapted(1.25, 5.0) <= 1.05
    assert adapted(0.2, 5.0) <= 1.05
    assert adapted(0.05, 0.2) <= 0.6
    assert adapted(0.8, 0.2) <= 1.0


def test_a_parent_that_waits_for_its_sub_agents_is_no_deadlock() -> None:
    """Sixteen agents that each start three sub-agents and wait for them, over a cache for four."""
    turns = tuple(Turn(200 if turn else 1500, 32, 0.3 if turn else 0.0) for turn in range(4))

    def agent(name: str) -> Agent:
        children = tuple(Agent(f"{name}.{number}", 0.0, turns) for number in range(3))
        return Agent(name, 0.0, (turns[0], replace(turns[1], children=children), *turns[2:]))

    machine = Machine("engine", ENGINE, 10_752, 128, 32, 2048)
    load = machine.control()
    engine = machine.engine(load)
    engine.run([agent(f"warm-{number}") for number in range(4)])
    engine.now_s += 10.0
    began = engine.now_s
    ours = engine.run([agent(f"agent-{number}") for number in range(16)])
    none = machine.engine(FixedLimit()).run([agent(f"agent-{number}") for number in range(16)])
    assert len(ours.sessions) == 64
    assert ours.ended_s - began <= 1.03 * none.ended_s
    assert load.faults([]) == []


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.floats(0.0, 8.0),
    st.floats(3_000, 20_000),
    st.floats(1.0, 30.0),
    st.booleans(),
    st.integers(0, 1000),
)
def test_everybody_ends_and_nobody_is_held_beyond_the_bound(
    programs: int, turns: int, gap_s: float, pool: float, bound_s: float, told: bool, seed: int
) -> None:
    blocks = int(pool) // 128
    load = LoadControl(blocks * 128, 128, bound_s)
    engine = PressureEngine(KvBlocks(blocks, 128), ENGINE, load, 8, 2048, ends="told" if told else "untold")
    for batch in range(2):
        drawn = Programs(programs, (1, turns), 800, 200, 16, gap_s, 1.0, told=told).draw(seed + batch, f"agent-{batch}")
        outcome = engine.run(drawn)
        assert len(outcome.sessions) == programs
        assert load.faults([]) == []
        assert load.report().held == 0


def with_sub_agents(
    seed: int, children: int = 2, delay_s: float = 0.0, share: float = 1.0, told: bool = True
) -> list[Agent]:
    """Twenty agents that start two sub-agents of three calls each after their second and their fourth call.

    Args:
        children: how many each starts at once instead.
        delay_s: between a parent's call and the sub-agents' at most.
        share: of the agents that start any.
        told: whether clients give session ids.
    """
    rng, delays = random.Random(seed), random.Random(f"delays {seed}")

    def turns(number: int, first: int, added: int, children: Callable[[int], tuple[Agent, ...]]) -> tuple[Turn, ...]:
        gaps = [0.0, *(rng.uniform(0.1, 0.3) for _ in range(number - 1))]
        return tuple(Turn(added if turn else first, 32, gap, children(turn)) for turn, gap in enumerate(gaps))

    def started(name: str, turn: int) -> tuple[Agent, ...]:
        names = [f"{name}/{turn}/{child}" for child in range(children)] if turn in (1, 3) and name in parents else []
        return tuple(
            Agent(name, delay_s * delays.random(), turns(3, 800, 150, lambda _: ()), told=told) for name in names
        )

    names = [f"agent-{seed}-{index}" for index in range(20)]
    parents = names[: round(share * len(names))]
    return [
        Agent(name, rng.uniform(0.0, 60.0), turns(6, 1500, 200, partial(started, name)), told=told) for name in names
    ]


def mean_session_s(load: Gate, ends: Ends, traffic: Callable[[int], list[Agent]]) -> float:
    """Of agents that start sub-agents, and of others, on a server that has seen nobody before."""
    machine = Machine("engine", ENGINE, 10_752, 128, 32, 2048)
    engine = machine.engine(load, ends)
    outcomes = [engine.run(traffic(seed)) for seed in range(4)]
    return mean(took for one in outcomes for name, took in one.sessions.items() if "/" not in name)


@pytest.mark.parametrize(
    "traffic",
    [{}, {"delay_s": 0.08}, {"children": 1}, {"children": 4}, {"share": 0.5}, {"told": False}],
    ids=["two at once", "later", "one", "four at once", "half of them", "without names"],
)
@pytest.mark.parametrize("ends", ["untold", "told"])
def test_sub_agents_whose_parents_are_not_named_cost_little(
    monkeypatch: pytest.MonkeyPatch, traffic: dict[str, Any], ends: Ends
) -> None:
    monkeypatch.setattr(pressure.Run, "program", property(lambda run: run.agent.name))
    drawn = partial(with_sub_agents, **traffic)
    load = Machine("engine", ENGINE, 10_752, 128, 32, 2048).control()
    assert mean_session_s(load, ends, drawn) < 1.05 * mean_session_s(FixedLimit(), ends, drawn)
    assert load.faults([]) == []
