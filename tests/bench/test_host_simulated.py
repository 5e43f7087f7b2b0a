"""Host memory behind a KV cache in the simulator, and load control with it: what comes back is not waited for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_agentserve.policy.load import LoadControl
from vllm_agentserve.simulator.host_blocks import Filling, HostBlocks, HostLink
from vllm_agentserve.simulator.host_policies import POLICIES, ProgramBlocks
from vllm_agentserve.simulator.host_table import ARMS, NONE, run
from vllm_agentserve.simulator.host_table import cell as small
from vllm_agentserve.simulator.kv_blocks import KvBlocks
from vllm_agentserve.simulator.load_search import COPIES, ENGINE, Cell, Machine, Programs, controlled, figures
from vllm_agentserve.simulator.pressure import FixedLimit, PressureEngine


def test_the_longest_unused_copies_go_first_and_the_ends_of_contexts_before_their_beginnings() -> None:
    host = HostBlocks(HostLink(50, 0.0, 0.0), 10)
    host.use(["a0", "a1", "a2"])
    host.use(["b0", "b1"])
    assert (len(host), host.hits(["a0", "a1", "a2", "a3"]), host.hits(["b0", "b1"])) == (5, 3, 2)
    host.use(["a0", "a1"])
    host.use(["c0"])
    assert (host.hits(["a0", "a1", "a2"]), host.hits(["b0", "b1"])) == (2, 2)
    host.use(["c1"])
    assert (host.hits(["a0", "a1"]), host.hits(["b0", "b1"]), host.hits(["c0", "c1"])) == (2, 1, 2)


def test_restores_come_one_after_the_other() -> None:
    host = HostBlocks(HostLink(1000, 5.0, 0.1), 10)
    assert host.restored_s(2, 1.0) == pytest.approx(1.007)
    assert host.restored_s(2, 1.001) == pytest.approx(1.014)
    assert host.restored_s(2, 2.0) == pytest.approx(2.007)


def test_without_host_memory_nothing_is_kept() -> None:
    host = HostBlocks(HostLink(), 10)
    host.use(["a0"])
    assert (len(host), host.hits(["a0"])) == (0, 0)


def cell(ratio: float, gap_s: float, size: float, told: bool = True) -> Cell:
    pool = round(43_008 / ratio)
    machine = Machine("engine", ENGINE, pool, 128, 32, 2048, HostLink(int(size * pool), *COPIES, told=told))
    return Cell("", "", machine, Programs(16, (6, 6), 1500, 200, 32, gap_s), (), seeds=1)


def without(case: Cell) -> dict[str, float]:
    return figures(case.machine.engine(FixedLimit()).run(case.traffic(0)), 0.0)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(("ratio", "gap_s"), [(2, 0.2), (2, 1.0), (2, 5.0), (4, 0.2), (4, 1.0), (4, 5.0)])
def test_with_much_host_memory_nobody_is_held_and_everything_comes_back(ratio: float, gap_s: float, told: bool) -> None:
    case = cell(ratio, gap_s, 8.0, told)
    none, ours = without(case), controlled(case, 0)
    assert ours["hit_ratio"] > 0.9
    assert ours["session_mean_s"] == pytest.approx(none["session_mean_s"], rel=0.02)
    assert ours["restored_ratio"] > 0.2
    assert none["session_mean_s"] < 0.95 * without(cell(ratio, gap_s, 0.0))["session_mean_s"]


@pytest.mark.parametrize("size", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("ratio", "gap_s"), [(2, 0.2), (2, 1.0), (2, 5.0), (4, 0.2), (4, 1.0), (4, 5.0)])
def test_load_control_costs_nothing_with_host_memory(ratio: float, gap_s: float, size: float) -> None:
    case = cell(ratio, gap_s, size)
    none, ours = without(case), controlled(case, 0)
    assert ours["session_mean_s"] <= 1.01 * none["session_mean_s"]
    assert ours["session_p95_s"] <= 1.03 * none["session_p95_s"]
    assert ours["makespan_s"] <= 1.03 * none["makespan_s"]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.floats(0.0, 8.0),
    st.floats(3_000, 20_000),
    st.floats(0.0, 4.0),
    st.floats(0.0, 500.0),
    st.integers(0, 1000),
)
def test_everybody_ends_and_all_blocks_are_free_then(
    programs: int, turns: int, gap_s: float, pool: float, size: float, load_ms: float, seed: int
) -> None:
    blocks = KvBlocks(int(pool) // 128, 128)
    link = HostLink(int(size * pool), load_ms, 0.002)
    load = LoadControl(blocks.capacity * 128, 128, 30.0, link)
    engine = PressureEngine(blocks, ENGINE, load, 8, 2048, ends="untold", host=link)
    for batch in range(2):
        drawn = Programs(programs, (1, turns), 800, 200, 16, gap_s, 1.0).draw(seed + batch, f"agent-{batch}")
        outcome = engine.run(drawn)
        assert len(outcome.sessions) == programs
        assert outcome.restored <= outcome.found <= outcome.sought
        assert blocks.free == blocks.capacity
        assert load.faults([]) == []


HALF = [(pressure, gap_s) for pressure in (2, 4) for gap_s in (0.2, 1.0, 5.0)]


@pytest.mark.parametrize("controls", [False, True], ids=["alone", "beside load control"])
@pytest.mark.parametrize(("pressure", "gap_s"), HALF)
def test_in_half_of_what_is_live_programs_find_more_than_with_vllms_policies(
    pressure: float, gap_s: float, controls: bool
) -> None:
    arms = {arm: run(small(pressure, gap_s), arm, 0, controls) for arm in ARMS}
    others = max(arms["lru"]["hit_ratio"], arms["arc"]["hit_ratio"])
    assert arms["program"]["hit_ratio"] >= min(others + 0.05, 0.98)
    for name in ("session_mean_s", "session_p95_s", "makespan_s"):
        assert arms["program"][name] <= 1.01 * arms[NONE][name]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "program"])
@pytest.mark.parametrize("controls", [False, True], ids=["alone", "beside load control"])
@pytest.mark.parametrize(("pressure", "gap_s"), HALF)
def test_half_of_what_is_live_makes_no_session_slower_than_no_host(
    pressure: float, gap_s: float, controls: bool, policy: str
) -> None:
    case = small(pressure, gap_s)
    none, ours = run(case, NONE, 1, controls), run(case, policy, 1, controls)
    assert ours["session_mean_s"] <= 1.02 * none["session_mean_s"]
    if controls:
        assert ours["session_mean_s"] <= 1.02 * run(case, policy, 1)["session_mean_s"], (
            "who is held waits for something"
        )


@pytest.mark.parametrize("pressure", [2, 4])
def test_ends_that_are_told_wrongly_cost_no_hits(pressure: float) -> None:
    case = small(pressure, 1.0)
    arms = {arm: run(case, arm, 0, ends="untrue") for arm in (NONE, "lru", "program")}
    assert arms["program"]["hit_ratio"] >= max(arms[NONE]["hit_ratio"], arms["lru"]["hit_ratio"]) - 0.01


@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.floats(0.0, 8.0),
    st.floats(3_000, 20_000),
    st.floats(0.0, 2.0),
    st.booleans(),
    st.integers(0, 1000),
)
def test_everybody_ends_with_every_policy(
    policy: str, programs: int, turns: int, gap_s: float, pool: float, size: float, first: bool, seed: int
) -> None:
    blocks = KvBlocks(int(pool) // 128, 128)
    link = HostLink(int(size * pool), *COPIES)
    engine = PressureEngine(
        blocks,
        ENGINE,
        FixedLimit(),
        8,
        2048,
        ends="untold",
        resume_first=first,
        host=link,
        host_policy=POLICIES[policy],
    )
    for batch in range(2):
        drawn = Programs(programs, (1, turns), 800, 200, 16, gap_s, 1.0).draw(seed + batch, f"agent-{batch}")
        outcome = engine.run(drawn)
        assert len(outcome.sessions) == programs
        assert outcome.restored <= outcome.found <= outcome.sought
        assert blocks.free == blocks.capacity
        host = engine._host
        assert len(host) <= link.host_tokens // 128
        if isinstance(host, ProgramBlocks):
            assert host.hosting.faults() == []


def offered(host: HostBlocks, name: str, keys: list[str], last: bool = False) -> Filling:
    call = Filling(name)
    host.arrive(call, 0.0)
    host.admit(call)
    host.fill(call, keys, 0, 0.0)
    host.end(call, keys, 0.0, last)
    return call


def test_arc_drops_first_what_was_used_once() -> None:
    host = POLICIES["arc"](HostLink(40, 0.0, 0.0), 10)
    for _ in range(2):
        offered(host, "a", ["a0", "a1"])
    offered(host, "b", ["b0", "b1"])
    offered(host, "c", ["c0"])
    assert (host.hits(["a0", "a1"]), host.hits(["b0", "b1"]), host.hits(["c0"])) == (2, 1, 1)


def test_blocks_that_came_back_are_not_offered_again() -> None:
    host = POLICIES["lru"](HostLink(100, 0.0, 0.0), 10)
    offered(host, "a", ["a0", "a1", "a2"])
    call = Filling("a")
    call.restored(1, 2)
    host.fill(call, ["a0", "a1", "a2", "a3"], 3, 1.0)
    assert (call.offered, call.seen, len(host)) == (4, 1, 4)


def test_where_too_little_can_go_nothing_is_stored() -> None:
    for policy in POLICIES.values():
        host = policy(HostLink(20, 0.0, 0.0), 10)
        assert offered(host, "a", ["a0", "a1", "a2"]).offered == 0
        assert len(host) == 0


@pytest.mark.parametrize("gap_s", [0.2, 1.0])
@pytest.mark.parametrize(("ratio", "size"), [(2, 1.0), (2, 2.0), (4, 2.0), (4, 4.0)])
def test_copies_before_a_context_is_asked_for_would_gain_next_to_nothing(ratio: int, size: float, gap_s: float) -> None:
    """They could hide no more than what restores take: as if these took no time."""
    found = []
    for copies in (COPIES, (0.0, 0.0)):
        pool = 43_008 // ratio
        machine = Machine("engine", ENGINE, pool, 128, 32, 2048, HostLink(int(size * pool), *copies))
        case = Cell("", "", machine, Programs(16, (6, 6), 1500, 200, 32, gap_s), (), seeds=1)
        found.append(controlled(case, 0, "told")["session_mean_s"])
    as_measured, instant = found
    assert instant >= 0.97 * as_measured
