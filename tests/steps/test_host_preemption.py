"""Calls that lose their places where there is host memory, on vLLM's real scheduler and connector: what they computed is in the
host by then, and comes back as one load."""

from typing import Any

import pytest

from tests.support.host_calls import ask, finished, started
from tests.support.host_driver import HostDriver
from vllm_agentserve.policy.controller import BudgetController
from vllm_agentserve.policy.order import DECIDE_STEPS

PROMPT, ANSWER = 64, 430


class Priced(BudgetController):
    """What is lost does not depend on how long the first prompt took here."""

    def prompt_ms(self, tokens: int, context: int) -> float:
        return 0.001 * tokens


def long_call(chunks: int, asynchronous: bool = False) -> tuple[Any, HostDriver, list[int]]:
    """A long call has the only place, and another waits that needs all KV blocks; the tokens of every load since the start."""
    scheduler, driver = started(
        num_blocks=33,
        chunks=chunks,
        max_num_seqs=1,
        asynchronous=asynchronous,
        controller=Priced,
        policy="plas",
        program_preempt_share=0.5,
        program_quantum_ms=1.0,
        program_promote_ratio=100_000,
    )
    loads: list[int] = []
    restored = driver.memory.tier.restored

    def noted(tokens: int, seconds: float) -> None:
        if tokens:
            loads.append(tokens)
        restored(tokens, seconds)

    driver.memory.tier.restored = noted  # type: ignore[method-assign]
    ask(scheduler, "long", PROMPT, max_tokens=ANSWER)
    for _ in range(10 * DECIDE_STEPS + 3):
        driver.step()
    ask(scheduler, "new", 480, max_tokens=8)
    return scheduler, driver, loads


def preempted(chunks: int = 512) -> tuple[Any, HostDriver, list[int]]:
    """The long call has lost its place."""
    scheduler, driver, loads = long_call(chunks)
    for _ in range(10 * DECIDE_STEPS):
        driver.step()
        if scheduler.counts["program_preemptions"]:
            return scheduler, driver, loads
    raise AssertionError("nobody lost a place")


def test_a_preempted_call_finds_its_answer_in_the_host_as_one_load() -> None:
    scheduler, driver, loads = preempted()
    long = scheduler.requests["long-0"]
    had = long.num_tokens
    assert had > PROMPT + 5 * DECIDE_STEPS
    assert scheduler.host.restorable_tokens(long, 0) >= had - 17, "all full blocks are stored by now"
    finished(scheduler, driver)
    assert driver.checked > had
    assert len(loads) == 1
    # What the new call did not need is in the KV cache still.
    assert loads[0] >= had - 17 - 2 * 16
    assert scheduler.counts["program_preempted_tokens"] <= 17
    driver.close()


def test_what_the_host_has_is_no_work_that_is_repeated() -> None:
    scheduler, driver, _ = preempted()
    call, account = scheduler.calls["long-0"], scheduler.engine_policy.programs.account
    assert call.lost_ms == account._pending_ms
    assert call.lost_ms <= 0.001 * 17
    finished(scheduler, driver)
    assert 0 < account.lost_ms <= 0.001 * 17
    driver.close()


def test_with_asynchronous_scheduling_vllm_gives_no_blocks_back_and_nobody_loses_a_place() -> None:
    """A step is always under way that may write to the blocks that the connector would still read."""
    scheduler, driver, _ = long_call(512, asynchronous=True)
    for _ in range(3 * DECIDE_STEPS):
        driver.step()
    assert scheduler.counts["program_preemptions"] == 0
    finished(scheduler, driver)
    driver.close()


def test_what_the_host_dropped_meanwhile_is_charged() -> None:
    scheduler, driver, loads = preempted(chunks=30)
    had = scheduler.requests["long-0"].num_tokens
    finished(scheduler, driver)
    account = scheduler.engine_policy.programs.account
    assert account.lost_ms == pytest.approx(0.001 * scheduler.counts["program_preempted_tokens"])
    assert scheduler.counts["program_preempted_tokens"] > 17
    assert sum(loads) < had - 17
    driver.close()
