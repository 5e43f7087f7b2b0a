"""Programs first, on vLLM's real scheduler without a model: who is admitted when places are few."""

from typing import Any

import pytest
from schedulers import Driver, make_request, make_scheduler
from vllm.v1.request import RequestStatus


def started(policy: str, asynchronous: bool = False, **given: Any) -> tuple[Any, Driver]:
    options = {"policy": policy, "program_quantum_ms": 1.0} | given.pop("options", {})
    scheduler: Any = make_scheduler(asynchronous=asynchronous, options=options, max_num_seqs=1, **given)
    return scheduler, Driver(scheduler, depth=2 if asynchronous else 1)


def served(scheduler: Any, driver: Driver, limit: int = 2000) -> list[str]:
    """Runs until nobody is left; returns the order in which requests were first scheduled."""
    order: list[str] = []
    while scheduler.requests:
        assert limit > 0
        limit -= 1
        order += [name for name in driver.step() if name not in order]
    return order


def have_run(scheduler: Any, driver: Driver, *sessions: str, tokens: int = 40) -> None:
    """A call of each of these sessions, one after the other."""
    for session in sessions:
        scheduler.add_request(make_request(f"warm-{session}", 50, max_tokens=tokens, session=session))
        served(scheduler, driver)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("policy", "order"), [("fcfs", ["old", "new"]), ("plas", ["new", "old"]), ("atlas", ["new", "old"])]
)
def test_who_has_had_less_comes_first(policy: str, order: list[str], asynchronous: bool) -> None:
    scheduler, driver = started(policy, asynchronous)
    have_run(scheduler, driver, "a", tokens=400)
    scheduler.add_request(make_request("running", 20, max_tokens=5))
    driver.step()
    scheduler.add_request(make_request("old", 30, max_tokens=2, session="a"))
    scheduler.add_request(make_request("new", 30, max_tokens=2, session="b"))
    assert [name for name in served(scheduler, driver) if name != "running"] == order


def test_continuations_are_charged_to_their_program() -> None:
    """Without a session id: the prompt goes on from an answer, and so waits behind a program that has had nothing."""
    scheduler, driver = started("plas")
    first = make_request("first", 64, max_tokens=400)
    scheduler.add_request(first)
    served(scheduler, driver)
    context = list(first.all_token_ids)
    scheduler.add_request(make_request("running", 20, max_tokens=5))
    driver.step()
    scheduler.add_request(make_request("goes on", [*context, *range(40)], max_tokens=2))
    scheduler.add_request(make_request("new", 600, max_tokens=2))
    assert served(scheduler, driver)[-2:] == ["new", "goes on"]
    counts = scheduler.counts
    assert (counts["program_first_requests"], counts["program_inferred_requests"]) == (3, 1)


def test_nobody_starves_behind_programs_that_keep_coming() -> None:
    scheduler, driver = started("plas", options={"max_bypass_steps": 20, "program_promote_ratio": 100_000})
    have_run(scheduler, driver, "old", tokens=400)
    scheduler.add_request(make_request("running", 20, max_tokens=3))
    driver.step()
    scheduler.add_request(make_request("waits", 30, max_tokens=2, session="old"))
    for step in range(60):
        scheduler.add_request(make_request(f"new-{step}", 30, max_tokens=2))
        if "waits" in driver.step():
            break
    assert 15 <= step <= 26


def test_work_is_conserved() -> None:
    """A place is never left empty while somebody waits, whatever the levels."""
    scheduler, driver = started("plas")
    have_run(scheduler, driver, "a", "b")
    for number in range(12):
        scheduler.add_request(make_request(f"r{number}", 30, max_tokens=3, session="abc"[number % 3]))
    while scheduler.requests:
        assert sum(driver.step().values()) > 0


def test_nothing_is_left_behind() -> None:
    scheduler, driver = started("plas")
    for name in ("decoding", "waiting"):
        scheduler.add_request(make_request(name, 30, session="s"))
        driver.step()
    scheduler.finish_requests(["decoding", "waiting"], RequestStatus.FINISHED_ABORTED)
    driver.step()
    table = scheduler._programs.table
    assert not table._calls
    assert len(table) == 1
    assert scheduler._stats.take()["programs_live"] == 1


def test_vllms_own_priorities_stay_in_force() -> None:
    scheduler: Any = make_scheduler(policy="priority", options={"policy": "plas"})
    assert scheduler._programs is None


def test_who_comes_after_many_quiet_steps_has_waited_for_none_of_them() -> None:
    scheduler, driver = started("fcfs", options={"max_bypass_steps": 20})
    scheduler.add_request(make_request("running", 20, max_tokens=200))
    for _ in range(100):
        driver.step()
    scheduler.add_request(make_request("new", 30, max_tokens=2))
    for _ in range(10):
        driver.step()
    assert scheduler.counts["overdue_requests"] == 0
    for _ in range(15):
        driver.step()
    assert scheduler.counts["overdue_requests"] == 1
