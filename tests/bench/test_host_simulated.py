"""Host memory behind a KV cache in the simulator, and load control with it: what comes back is not waited for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_agentserve.policy.load import LoadControl
from vllm_agentserve.simulator.host_blocks import HostBlocks, HostLink
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
