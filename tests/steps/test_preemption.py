"""Places taken from running calls, on vLLM's real scheduler without a model."""

from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from tests.support.program_steps import served, started
from tests.support.schedulers import Driver, make_request
from vllm_agentserve.policy.controller import BudgetController
from vllm_agentserve.policy.order import DECIDE_STEPS
from vllm_agentserve.scheduler.features.preemption import Preemption


class Priced(BudgetController):
    """What is lost does not depend on how long the first prompt took here."""

    def prompt_ms(self, tokens: int, context: int) -> float:
        return 0.001 * tokens


def with_share(share: float, asynchronous: bool = False, **given: Any) -> tuple[Any, Driver]:
    options = {"program_preempt_share": share, "program_promote_ratio": 100_000}
    scheduler, driver = started("plas", asynchronous, options=options, **given)
    return scheduler, driver


def run_long(scheduler: Any, driver: Driver, hints: dict[str, Any] | None = None) -> None:
    """A call that has received much, and goes on."""
    scheduler.add_request(make_request("long", 64, max_tokens=1000, session="long", hints=hints))
    for _ in range(25 * DECIDE_STEPS + 3):
        driver.step()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_new_program_takes_the_place_of_one_that_has_had_much(asynchronous: bool) -> None:
    scheduler, driver = with_share(0.5, asynchronous)
    run_long(scheduler, driver)
    long = scheduler.requests["long"]
    scheduler.add_request(make_request("new", 30, max_tokens=8, session="new"))
    order = []
    for _ in range(2 * DECIDE_STEPS):
        order += [name for name in driver.step() if name not in order]
    assert order == ["long", "new"]
    assert scheduler.counts["program_preemptions"] == 1
    served(scheduler, driver)
    assert long.num_output_tokens == 1000
    # Its blocks were still there: what was computed again is less than a block.
    assert 0 < scheduler.counts["program_preempted_tokens"] <= 16
    account = scheduler.engine_policy.programs.account
    assert 0 < account.lost_ms <= 0.5 * account.service_ms


def test_without_a_share_nobody_is_preempted() -> None:
    scheduler, driver = started("plas")
    assert not any(isinstance(feature, Preemption) for feature in scheduler._events.features)
    run_long(scheduler, driver)
    scheduler.add_request(make_request("new", 30, max_tokens=8, session="new"))
    assert served(scheduler, driver) == ["long", "new"]
    assert scheduler.counts["program_preemptions"] == 0


def test_a_better_place_is_not_taken() -> None:
    scheduler, driver = with_share(0.5)
    run_long(scheduler, driver)
    scheduler.add_request(make_request("same", 30, max_tokens=8, session="long"))
    for _ in range(2 * DECIDE_STEPS):
        assert "same" not in driver.step()
    assert scheduler.counts["program_preemptions"] == 0


def test_a_small_share_is_kept() -> None:
    """The call that would be preempted has more to lose than the share of all service allows."""
    scheduler, driver = with_share(1e-9)
    run_long(scheduler, driver)
    scheduler.add_request(make_request("new", 30, max_tokens=8, session="new"))
    for _ in range(2 * DECIDE_STEPS):
        assert "new" not in driver.step()
    assert scheduler.counts["program_preemptions"] == 0


def test_batch_gives_way_even_at_the_first_level() -> None:
    scheduler, driver = with_share(0.5, controller=Priced)
    run_long(scheduler, driver, {"agent_class": "batch"})
    scheduler.add_request(make_request("new", 30, max_tokens=8, session="new"))
    order = []
    for _ in range(2 * DECIDE_STEPS):
        order += [name for name in driver.step() if name not in order]
    assert order == ["long", "new"]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_an_aborted_one_leaves_nothing(asynchronous: bool) -> None:
    scheduler, driver = with_share(0.5, asynchronous)
    run_long(scheduler, driver)
    scheduler.add_request(make_request("new", 30, max_tokens=100, session="new"))
    while not scheduler.counts["program_preemptions"]:
        driver.step()
    scheduler.finish_requests(["long"], RequestStatus.FINISHED_ABORTED)
    assert "new" in served(scheduler, driver)
    assert not scheduler.engine_policy.programs.account._pending


def test_nobody_gives_way_to_a_request_that_cannot_run_yet() -> None:
    scheduler, driver = with_share(0.5)
    run_long(scheduler, driver)
    grammar = make_request("new", 30, max_tokens=8, session="new")
    scheduler.add_request(grammar)
    grammar.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    for _ in range(2 * DECIDE_STEPS):
        driver.step()
    assert scheduler.counts["program_preemptions"] == 0


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_who_gave_up_its_place_has_one_again_within_the_bound(asynchronous: bool) -> None:
    """It has run for longer than that, and two calls of a better level always wait."""
    options = {"program_preempt_share": 0.5, "program_promote_ratio": 100_000, "max_bypass_steps": 40}
    scheduler, driver = started("plas", asynchronous, options=options)
    run_long(scheduler, driver)
    waited = longest = 0
    for step in range(300):
        if len(scheduler.waiting) < 3:
            scheduler.add_request(make_request(f"new {step}", 30, max_tokens=3))
        waited = 0 if "long" in driver.step() else waited + 1
        longest = max(longest, waited)
    assert scheduler.counts["program_preemptions"] >= 2
    assert 40 <= longest <= 50
    assert scheduler.requests["long"].num_output_tokens > 25 * DECIDE_STEPS


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_place_is_taken_too_where_fewer_may_run_than_the_runner_has_slots(asynchronous: bool) -> None:
    scheduler, driver = with_share(0.5, asynchronous, max_num_seqs=8, max_num_active_seqs=1)
    run_long(scheduler, driver)
    scheduler.add_request(make_request("new", 30, max_tokens=8, session="new"))
    order = []
    for _ in range(2 * DECIDE_STEPS):
        order += [name for name in driver.step() if name not in order]
    assert order == ["long", "new"]
    assert scheduler.counts["program_preemptions"] == 1


def test_nobody_gives_way_while_the_engine_is_paused_for_new_requests() -> None:
    scheduler, driver = with_share(0.5)
    run_long(scheduler, driver)
    scheduler.add_request(make_request("new", 30, max_tokens=8, session="new"))
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    for _ in range(2 * DECIDE_STEPS):
        assert driver.step() == {"long": 1}
    assert scheduler.counts["program_preemptions"] == 0
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert "new" in served(scheduler, driver)
