"""What is reported by class of calls: waiting times, first tokens and deadlines, from vLLM's real scheduler to /metrics."""

from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.support.metrics_page import Page
from tests.support.program_steps import served, started
from tests.support.schedulers import Driver, make_request, make_scheduler
from vllm_agentserve.policy.hints import CLASSES
from vllm_agentserve.scheduler.class_stats import (
    BUCKETS,
    CLASS_BOUNDS_S,
    CLASS_KEYS,
    FIRST_TOKEN,
    MET,
    MISSED,
    WAIT,
    class_times,
    count_time,
)

BATCH = {"agent_class": "batch"}


def calls(scheduler: Any, name: str, kind: str) -> float:
    return sum(scheduler.counts.get(one.calls, 0) for one in BUCKETS[name][kind])


def seconds(scheduler: Any, name: str, kind: str) -> float:
    return sum(scheduler.counts.get(one.seconds, 0.0) for one in BUCKETS[name][kind])


@pytest.mark.parametrize("policy", ["fcfs", "plas"])
def test_every_call_is_counted_once_in_its_class(policy: str) -> None:
    scheduler, driver = started(policy)
    for number in range(3):
        scheduler.add_request(make_request(f"batch-{number}", 30, max_tokens=2, hints=BATCH))
    for number in range(2):
        scheduler.add_request(make_request(f"said-{number}", 40, max_tokens=1, hints={"agent_class": "interactive"}))
    scheduler.add_request(make_request("silent", 700, max_tokens=3))
    served(scheduler, driver)
    for name in (WAIT, FIRST_TOKEN):
        assert {kind: calls(scheduler, name, kind) for kind in CLASSES} == {"interactive": 3, "batch": 3}
        assert all(seconds(scheduler, name, kind) > 0 for kind in CLASSES)
    for kind in CLASSES:
        assert seconds(scheduler, FIRST_TOKEN, kind) >= seconds(scheduler, WAIT, kind)
    assert not scheduler._unanswered


def test_who_has_no_token_has_no_first_one() -> None:
    scheduler, driver = started("fcfs")
    scheduler.add_request(make_request("waits", 30, max_tokens=2))
    scheduler.finish_requests("waits", RequestStatus.FINISHED_ABORTED)
    scheduler.add_request(make_request("runs", 3000, max_tokens=2))
    driver.step()
    scheduler.finish_requests("runs", RequestStatus.FINISHED_ABORTED)
    assert calls(scheduler, FIRST_TOKEN, "interactive") == 0
    assert calls(scheduler, WAIT, "interactive") == 1
    assert not scheduler._unanswered


def test_deadlines_are_met_or_missed_by_class() -> None:
    scheduler, driver = started("fcfs")
    day = {"agent_deadline_ms": 86_400_000}
    scheduler.add_request(make_request("met", 30, max_tokens=2, hints=day))
    scheduler.add_request(make_request("met too", 30, max_tokens=2, hints=day | BATCH))
    scheduler.add_request(make_request("missed", 30, max_tokens=2, hints={"agent_deadline_ms": 1e-6} | BATCH))
    scheduler.add_request(make_request("none", 30, max_tokens=2))
    served(scheduler, driver)
    found = {key: count for key, count in scheduler.counts.items() if key.startswith((MET, MISSED))}
    assert found == {f"{MET}:interactive": 1, f"{MET}:batch": 1, f"{MISSED}:batch": 1}


@pytest.mark.parametrize(
    "ends", [RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR, RequestStatus.FINISHED_IGNORED]
)
def test_who_is_given_up_before_the_deadline_counts_in_neither(ends: RequestStatus) -> None:
    """Nor does one that fails, as with a wrong grammar: its deadline was not met."""
    scheduler, driver = started("fcfs")
    scheduler.add_request(make_request("early", 30, max_tokens=9, hints={"agent_deadline_ms": 86_400_000}))
    scheduler.add_request(make_request("late", 30, max_tokens=9, hints={"agent_deadline_ms": 1e-6}))
    driver.step()
    for name in ("early", "late"):
        scheduler.finish_requests(name, ends)
    found = {key: count for key, count in scheduler.counts.items() if key.startswith((MET, MISSED))}
    assert found == {f"{MISSED}:interactive": 1}


def test_a_histogram_is_told_of_every_call() -> None:
    counts: dict[str, float] = {}
    for value in (0.0, 0.01, 0.011, 5000.0):
        count_time(counts, WAIT, True, value)
    assert counts.keys() <= CLASS_KEYS
    assert list(class_times(counts)) == [
        (WAIT, "batch", pytest.approx(0.005), 2),
        (WAIT, "batch", pytest.approx(0.011), 1),
        (WAIT, "batch", 5000.0, 1),
    ]
    assert max(CLASS_BOUNDS_S) == 600.0


def test_the_page_has_the_series_of_both_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, driver = started("fcfs")
    scheduler.add_request(make_request("r", 30, max_tokens=2, hints=BATCH | {"agent_deadline_ms": 86_400_000}))
    served(scheduler, driver)
    page = Page(monkeypatch)
    page.record(dict(scheduler.counts))
    for name in (WAIT, FIRST_TOKEN):
        counted = [page.value(f"{name}_count", **{"class": kind}) for kind in CLASSES]
        assert counted == [0, 1]
    assert page.value(f"{MET}_total", **{"class": "batch"}) == 1
    assert page.value(f"{MISSED}_total", **{"class": "batch"}) == 0


@pytest.mark.parametrize("max_tokens", [1, 3])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("at_once", [False, True], ids=["awaited", "at once"])
def test_a_streamed_session_has_one_first_token(max_tokens: int, asynchronous: bool, at_once: bool) -> None:
    scheduler: Any = make_scheduler(asynchronous=asynchronous)
    driver = Driver(scheduler, depth=2 if asynchronous else 1)
    parts = [make_request("s", 40, max_tokens=max_tokens, session="s", resumable=True) for _ in range(3)]
    for part in parts:
        scheduler.add_request(part)
        for _ in range(0 if at_once else 10):
            driver.step()
            assert calls(scheduler, FIRST_TOKEN, "interactive") <= 1
    for _ in range(30):
        driver.step()
    assert scheduler.num_waiting_for_streaming_input == 1
    assert calls(scheduler, FIRST_TOKEN, "interactive") == calls(scheduler, WAIT, "interactive") == 1
    assert not scheduler._unanswered


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_the_first_token_counts_when_it_is_there(asynchronous: bool) -> None:
    scheduler: Any = make_scheduler(asynchronous=asynchronous)
    driver = Driver(scheduler, depth=2 if asynchronous else 1)
    for _ in range(2):  # the second part of its input is there before the first is answered
        scheduler.add_request(make_request("s", 40, max_tokens=1, session="s", resumable=True))
    while not scheduler.calls["s"].answered:
        driver.step()
    assert scheduler.requests["s"].num_output_tokens == 0
    assert calls(scheduler, FIRST_TOKEN, "interactive") == 1
