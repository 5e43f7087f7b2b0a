"""KV blocks kept for programs in a real engine, in float32: answers are stock's, from a cache that is far too small."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from tests.support.mix import close, make_llm, scheduler_of
from tests.support.pressed_agents import BLOCKS, TURNS, contexts, run_agents
from vllm_agentserve.bench.records import Record
from vllm_agentserve.kv.ledger import Ledger

AGENTS = 8
"""Their contexts want 60 blocks at their ends."""


@pytest.fixture(scope="module")
def stocks(toy_model: Path) -> list[Record]:
    llm = make_llm(toy_model, None, blocks=BLOCKS)
    records = run_agents(llm, AGENTS, rounds=2)
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
    found = run_agents(ours, AGENTS, rounds=2)
    assert len(found) == 2 * AGENTS * TURNS
    assert contexts(found) == contexts(stocks)

    def hits(records: list[Record]) -> int:
        """Of the second round: nobody was seen to come back before the first."""
        return sum(record.cached_tokens or 0 for record in records if record.round == 1)

    assert hits(found) > hits(stocks)
    assert len(kept) >= 4
    scheduler = scheduler_of(ours)
    assert scheduler.integrity.faults() == []
