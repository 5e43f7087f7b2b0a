"""Steps of decodes only: what they run, when they are counted, and what they teach."""

import sys
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.support.paths import ROOT
from tests.support.schedulers import Driver, make_request, make_scheduler
from vllm_agentserve.policy.call import Chunk
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.scheduler import integrity
from vllm_agentserve.scheduler.features import Events, Feature
from vllm_agentserve.scheduler.stats import COUNTERS
from vllm_agentserve.scheduler.steps import Step, StepLog


class Observed:
    """Stands in for the policy: notes what it is told of steps."""

    def __init__(self, relevels: bool) -> None:
        self.programs = SimpleNamespace(relevels=relevels)
        self.told: list[tuple[Any, ...]] = []

    def observe(self, *given: Any) -> None:
        self.told.append(given)


def run(relevels: bool = False, follows: bool = False, steps: int = 60) -> tuple[Observed, dict[str, float], list[int]]:
    """Steps of four decodes, the 31st with a chunk, the 41st empty; returns how many were told of after each step too."""
    policy, counts, told = Observed(relevels), dict.fromkeys(COUNTERS, 0.0), []
    log: Any = StepLog(policy, counts, [lambda *given: None] if follows else [])  # type: ignore[arg-type]
    for number in range(steps):
        output, now = object(), float(number)
        chunks = [Chunk(Phase.COLD_PREFILL, 10, 0)] if number == 30 else []
        context = 4000 if log.wants_context or chunks else 0
        log.in_flight.append(Step(output, now, 0 if number == 40 else 4, context, number % 2 == 0, chunks))
        log.finished(output, now + 0.01 * (1 + number % 3))
        told.append(len(policy.told))
    log.take_in()
    return policy, counts, told


def test_steps_that_are_taken_in_later_are_told_of_as_if_at_once() -> None:
    later, at_once = run(), run(follows=True)
    assert (later[0].told, later[1]) == (at_once[0].told, at_once[1])
    assert (later[1]["decode_steps"], later[1]["decode_sequences"], later[1]["mixed_steps"]) == (58, 59 * 4, 1)
    assert later[2] != at_once[2]
    # Those that teach, those with chunks and those with nothing leave none behind.
    assert all(number - told <= 8 for number, told in enumerate(later[2]))
    assert later[2][:17] == list(range(1, 18))
    assert later[2][30] == 31


@pytest.mark.parametrize("how", [{"relevels": True}, {"follows": True}], ids=["programs", "features"])
def test_programs_and_features_are_told_of_every_step_at_once(how: dict[str, bool]) -> None:
    _, _, told = run(**how)
    assert told == [*range(1, 41), *range(40, 60)]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_report_has_every_step_in_it(asynchronous: bool) -> None:
    options = {"mode": "time-sliced", "stats_interval_ms": 60_000.0}
    scheduler: Any = make_scheduler(asynchronous=asynchronous, options=options)
    driver = Driver(scheduler, depth=2 if asynchronous else 1)
    scheduler.add_request(make_request("a", 40))
    for _ in range(10):
        driver.step()
    before = scheduler.report()["decode_steps"], len(scheduler.engine_policy.controller.tpot)
    for steps in (9, 13):
        for _ in range(steps):
            driver.step()
        report = scheduler.report()
        assert (report["decode_steps"], report["decode_sequences"]) == (steps, steps)
    assert len(scheduler.engine_policy.controller.tpot) == before[1] + 22


def test_a_step_of_decodes_runs_few_functions_of_ours() -> None:
    """It is the same for every step but one in eight, which teaches the model."""
    scheduler: Any = make_scheduler(options={"mode": "time-sliced", "stats_interval_ms": 60_000.0})
    driver = Driver(scheduler)
    for number in range(8):
        scheduler.add_request(make_request(f"r{number}", 40))
    for _ in range(40):
        driver.step()
    ran: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT / "vllm_agentserve")):
            ran.append(frame.f_code.co_qualname)

    steps = []
    for _ in range(8):
        ran.clear()
        sys.setprofile(note)
        driver.step()
        sys.setprofile(None)
        steps.append([name for name in ran if not name.startswith("AgentQueue.__len__")])
    shortest = [name for name in steps if len(name) == min(map(len, steps))]
    assert len(shortest) == 7
    assert set(map(tuple, shortest)) == {
        ("AgentScheduler.schedule", "AgentQueue.__bool__", "AgentScheduler.update_from_output", "StepLog.finished")
    }


def test_a_request_that_neither_runs_nor_waits_makes_no_step_longer() -> None:
    """Such as one that has ended, and whose blocks are still sent."""

    class Follows(Feature):
        steps = 0

        def before_step(self, decodes: int, context: int) -> None:
            self.steps += 1

    scheduler: Any = make_scheduler(options={"mode": "time-sliced"})
    follows = Follows()
    scheduler._events = Events([*scheduler._events.features, follows])
    driver = Driver(scheduler)
    scheduler.add_request(make_request("a", 40))
    driver.step()
    scheduler.requests["ended"] = make_request("ended", 40)
    driver.step()
    assert follows.steps == 1
    del scheduler.requests["ended"]
    scheduler.add_request(make_request("b", 40))
    driver.step()
    assert follows.steps == 2


@pytest.mark.parametrize("reports", [True, False])
def test_an_engine_that_becomes_idle_is_checked(monkeypatch: pytest.MonkeyPatch, reports: bool) -> None:
    monkeypatch.setattr(integrity, "monotonic", lambda: 1000.0)
    scheduler: Any = make_scheduler(options={"mode": "time-sliced", "integrity_check_interval_s": 60})
    scheduler.log_stats = reports
    driver = Driver(scheduler)
    scheduler.add_request(make_request("a", 40))
    scheduler.add_request(make_request("b", 40, max_tokens=3))
    scheduler.integrity.faults = lambda: ["planted"]
    for _ in range(5):
        driver.step()
    assert scheduler.counts["integrity_faults"] == 0
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    driver.step()
    assert scheduler.counts["integrity_faults"] == 1
