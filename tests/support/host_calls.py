"""Calls of programs on a scheduler with host memory, and their ends: what step tables of host memory have in common."""

import random
import time
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.support.host_driver import HostDriver
from tests.support.schedulers import make_request, make_scheduler
from vllm_agentserve.policy.controller import BudgetController

WAIT_S = 10.0
"""What steps get until all calls have ended; load control lets calls begin after less, whatever it has learned here."""
OPTIONS = {
    "mode": "time-sliced",
    "load_control": False,
    "tpot_slo_ms": 10_000,
    "first_chunk_tokens": 4096,
    "kv_host_policy": "lru",
}


def started(
    num_blocks: int = 65,
    chunks: int = 512,
    holds: bool = False,
    max_num_seqs: int = 64,
    asynchronous: bool = False,
    controller: type[BudgetController] = BudgetController,
    **options: Any,
) -> tuple[Any, HostDriver]:
    """A KV cache of 1024 tokens and a host of 8192."""
    scheduler: Any = make_scheduler(
        asynchronous=asynchronous,
        options=OPTIONS | {"kv_host_gib": 1.0} | options,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        host_chunks=chunks,
        controller=controller,
    )
    return scheduler, HostDriver(scheduler, holds, depth=2 if asynchronous else 1)


def finished(scheduler: Any, driver: HostDriver, limit: int = 500) -> None:
    """All requests, and all copies. What load control holds begins after some time, and not after some steps."""
    began, steps = time.monotonic(), 0
    while scheduler.has_requests():
        if steps >= limit and time.monotonic() - began > WAIT_S:
            raise AssertionError(f"{list(scheduler.requests)} did not end")
        driver.step()
        steps += 1
    while driver.in_flight:
        driver.finish()
    assert driver.wrong == [], driver.wrong
    assert scheduler.integrity.faults() == []
    assert not scheduler.engine_policy.restoring
    copies = scheduler.connector.connector_scheduler.manager._policy
    books = [copies.chunks] if hasattr(copies, "chunks") else [copies.t1, copies.t2]
    assert all(chunk.ref_cnt == 0 for chunks in books for chunk in chunks.values())
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == scheduler.kv_cache_config.num_blocks - 1


def prompt(name: str, tokens: int) -> list[int]:
    return [(sum(map(ord, name)) * 131 + token) % 4000 for token in range(tokens)]


def ask(scheduler: Any, name: str, tokens: int, max_tokens: int = 4, number: int = 0, **hints: Any) -> Any:
    """A call of the program `name`, whose prompt begins with those before it."""
    request = make_request(f"{name}-{number}", prompt(name, tokens), max_tokens=max_tokens, session=name, hints=hints)
    scheduler.add_request(request)
    return request


def reset(scheduler: Any, running: bool) -> None:
    """Where blocks are being filled, or belong to a call that was aborted meanwhile, vLLM refuses it."""
    if running and any(request.is_finished() for request in scheduler.requests.values()):
        return
    if running and not all(call.restored for call in scheduler.engine_policy.restoring):
        with pytest.raises(RuntimeError, match="is being copied back from host memory"):
            scheduler.reset_prefix_cache(reset_running_requests=True)
        return
    scheduler.reset_prefix_cache(reset_running_requests=running)


def random_calls(
    scheduler: Any, driver: HostDriver, rng: random.Random, ends: float = 0.0, critical: float = 0.0
) -> None:
    """Calls of six programs, aborts, resets, and copies that are late, to their end; what is read is checked in every step.

    Args:
        ends: share of the calls that are said to be the last of their program.
        critical: share of the calls that are critical.
    """
    lengths, before = dict.fromkeys("abcdef", 60), dict[str, float]()
    for number in range(300):
        name = rng.choice("abcdef")
        if len(scheduler.requests) < 8 and rng.random() < 0.4:
            lengths[name] = min(lengths[name] + rng.randrange(40), 420)
            hints = {"agent_last": True} if ends and rng.random() < ends else {}
            if critical and rng.random() < critical:
                hints["agent_critical"] = True
            ask(scheduler, name, lengths[name], max_tokens=rng.randrange(1, 60), number=number, **hints)
        if scheduler.requests and rng.random() < 0.06:
            scheduler.finish_requests(rng.choice([*scheduler.requests]), RequestStatus.FINISHED_ABORTED)
        if rng.random() < 0.02:
            while driver.in_flight:
                driver.finish()
            reset(scheduler, running=rng.random() < 0.5)
        driver.step()
        if rng.random() < 0.5:
            driver.copies.let_go(rng.randrange(4))
        assert driver.wrong == []
        assert scheduler.integrity.faults() == []
        found = {name: count for name, count in scheduler.counts.items() if name.startswith("returning_")}
        assert all(count >= before.get(name, 0) for name, count in found.items()), found
        before = found
    driver.holds = False
    finished(scheduler, driver)
    assert driver.checked > 10_000
