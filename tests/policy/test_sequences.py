"""Tables of remembered sequences take no more memory than they may."""

import tracemalloc
from typing import Any

import pytest

from vllm_agentserve.policy.attribution import Lineage
from vllm_agentserve.policy.rewritten import RewrittenHistories
from vllm_agentserve.policy.sequences import MOST_BYTES, SequenceTable


def remember(table: SequenceTable[Any], number: int, block: int) -> None:
    """A prompt of almost three blocks, and an answer of 600 tokens, with hashes of its own."""
    prompt = 3 * block - 1
    tokens = [number + place for place in range(prompt + 600)]
    hashes = [f"{number} {place}".rjust(32).encode() for place in range(len(tokens) // block)]
    table.remember(f"program {number}", 0.0, hashes, tokens, prompt)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [Lineage, RewrittenHistories])
@pytest.mark.parametrize("block", [16, 128, 1056])
def test_a_table_takes_no_more_than_its_bytes(kind: Any, block: int) -> None:
    table = kind(block)
    for number in range(12_000):
        remember(table, number, block)
        assert table.size_bytes <= MOST_BYTES
    assert len(table) > 2000
    for most in (10_000, 500, 0):
        small = kind(block, most_bytes=most)
        for number in range(50):
            remember(small, number, block)
        assert small.size_bytes <= most
        assert bool(len(small)) == (most == 10_000)


@pytest.mark.parametrize("kind", [Lineage, RewrittenHistories])
def test_the_estimate_is_what_is_allocated(kind: Any) -> None:
    remember(kind(128), 0, 128)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        table = kind(128)
        for number in range(1000):
            remember(table, number, 128)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert table.size_bytes == pytest.approx(after - before, rel=0.35)


@pytest.mark.parametrize("kind", [Lineage, RewrittenHistories])
def test_what_is_forgotten_is_not_counted(kind: Any) -> None:
    table = kind(16, capacity=10)
    for number in range(100):
        remember(table, number, 16)
    full = table.size_bytes
    for number in range(100, 200):
        remember(table, number, 16)
    assert table.size_bytes == full
    for _ in range(3 * table.ALIKE):
        remember(table, 7, 16)
    assert len(table) <= 10
