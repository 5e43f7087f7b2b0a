"""KV blocks kept for programs in a real engine, in float32: answers are stock's, from a cache that is far too small."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from tests.support.mix import close, make_llm, scheduler_of
from vllm_agentserve.bench.closed_loop import ClosedLoop
from vllm_agentserve.bench.drawing import WorkloadOptions, draw_sessions
from vllm_agentserve.bench.records import Record
from vllm_agentserve.bench.workloads import Uniform, around, find_workload
from vllm_agentserve.kv.ledger import Ledger

AGENTS, TURNS, BLOCKS = 8, 4, 34
"""Contexts of about 900 tokens at their ends: 60 KV blocks of 128 tokens for all of them."""
WORKLOAD = replace(
    find_workload("pressure"),
    turns=Uniform(TURNS, TURNS),
    system=Uniform(400, 500),
    result=Uniform(60, 120),
    answer=Uniform(16, 16),
    tool_s=around(0.2),
)


def agents(llm: LLM, rounds: int) -> list[Record]:
    """The same agents in every engine; other ones in every round."""
    records = []
    for number in range(rounds):
        sessions = draw_sessions(WORKLOAD, WorkloadOptions(agents=AGENTS), number)
        records += ClosedLoop(llm.llm_engine, sessions, "", number, told=True, suffix=f"@{number}").run()
    return records


def contexts(records: list[Record]) -> dict[tuple[int, str, int], str]:
    """What each call was sent: all answers before it are part of that."""
    return {(record.round, record.session, record.turn): record.prompt for record in records}


@pytest.fixture(scope="module")
def stocks(toy_model: Path) -> list[Record]:
    llm = make_llm(toy_model, None, blocks=BLOCKS)
    records = agents(llm, rounds=2)
    close(llm)
    return records


@pytest.fixture(scope="module")
def ours(toy_model: Path, stocks: list[Record]) -> Iterator[LLM]:
    options = {"mode": "time-sliced", "tpot_slo_ms": 400, "kv_retain": True, "load_control": False}
    llm = make_llm(toy_model, options, blocks=BLOCKS)
    yield llm
    close(llm)


def test_agents_get_stocks_answers_and_find_more(
    ours: LLM, stocks: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, keep = set(), Ledger.keep

    def counted(self: Ledger, name: str, context: list[Any]) -> None:
        kept.add(name)
        keep(self, name, context)

    monkeypatch.setattr(Ledger, "keep", counted)
    found = agents(ours, rounds=2)
    assert len(found) == 2 * AGENTS * TURNS
    assert contexts(found) == contexts(stocks)

    def hits(records: list[Record]) -> int:
        """Of the second round: nobody was seen to come back before the first."""
        return sum(record.cached_tokens or 0 for record in records if record.round == 1)

    assert hits(found) > hits(stocks)
    assert len(kept) >= 4
    scheduler = scheduler_of(ours)
    assert scheduler.integrity.faults() == []
