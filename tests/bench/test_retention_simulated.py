"""Retention in the simulator: contexts of twice the KV cache, tools that take 5 s."""

import pytest

from vllm_agentserve.simulator.load_search import ENGINE, Cell, Machine, Programs
from vllm_agentserve.simulator.retention_table import BOTH, CONTROL, ORDER, POOL, RETENTION, STOCK, run


def cell(pressure: float, gap_s: float) -> Cell:
    machine = Machine("engine", ENGINE, int(POOL / pressure), 16, 32, 2048)
    return Cell("", "", machine, Programs(16, (6, 6), 1500, 200, 32, gap_s), ())


def test_more_is_found_and_sessions_are_shorter() -> None:
    figures = {arm: run(cell(2, 5.0), arm, seed=0) for arm in (STOCK, ORDER, CONTROL, RETENTION, BOTH)}
    assert figures[RETENTION]["hit_ratio"] >= figures[STOCK]["hit_ratio"] + 0.10
    assert figures[RETENTION]["hit_ratio"] >= figures[ORDER]["hit_ratio"] + 0.10
    assert figures[BOTH]["session_mean_s"] < figures[CONTROL]["session_mean_s"]


@pytest.mark.parametrize("gap_s", [0.2, 5.0])
def test_nothing_is_lost_where_all_contexts_fit(gap_s: float) -> None:
    for pressure in (0.5, 1):
        stock, ours = (run(cell(pressure, gap_s), arm, seed=1) for arm in (STOCK, RETENTION))
        assert ours["hit_ratio"] >= stock["hit_ratio"] - 0.01
