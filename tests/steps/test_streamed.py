"""Streamed sessions on vLLM's real scheduler without a model: between two parts of its input one neither runs nor waits."""

from typing import Any

import pytest
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from tests.support.schedulers import Driver, make_request, make_scheduler
from vllm_agentserve.policy.program import Stage
from vllm_agentserve.scheduler.program_stats import program_report
from vllm_agentserve.top_table import STAGES
from vllm_agentserve.vllm_compat import installed_vllm

both = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def started(asynchronous: bool = False, **options: Any) -> tuple[Any, Driver]:
    scheduler: Any = make_scheduler(asynchronous=asynchronous, options={"policy": "plas"} | options)
    return scheduler, Driver(scheduler, depth=2 if asynchronous else 1)


def part(name: str, tokens: int, max_tokens: int = 3, last: bool = False) -> Any:
    return make_request(name, tokens, max_tokens=max_tokens, session=name, resumable=not last)


def until(driver: Driver, done: Any, limit: int = 30) -> None:
    while not done():
        assert limit > 0
        limit -= 1
        driver.step()


def program_of(scheduler: Any, name: str) -> Any:
    return scheduler.calls[name].program.program


@both
def test_between_two_parts_nothing_is_charged(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    scheduler.add_request(part("streamed", 40))
    until(driver, lambda: scheduler.num_waiting_for_streaming_input)
    table, program = scheduler.engine_policy.programs.table, program_of(scheduler, "streamed")
    scheduler.add_request(make_request("other", 40, max_tokens=100, session="other"))
    driver.step()
    before = table.attained_ms(program), table.clock.decoded(program), table.clock.kv_tokens(program)
    for _ in range(20):
        driver.step()
    assert scheduler.calls["streamed"].program.stage is Stage.PAUSED
    assert (table.attained_ms(program), table.clock.decoded(program), table.clock.kv_tokens(program)) == before
    # Its KV is still there, and it is no call that does something: `agentserve top` says that it runs a tool.
    assert before[2] >= 40
    report = program_report(table, 0.0)
    row = next(key.partition(":")[2] for key, value in report.items() if value == before[2] and "kv_tokens" in key)
    assert [report[f"program_row_{name}:{row}"] for name in STAGES] == [0, 0, 0, 0]
    assert scheduler.integrity.faults() == []


@both
def test_the_next_part_waits_and_runs_again(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    scheduler.add_request(part("streamed", 40))
    until(driver, lambda: scheduler.num_waiting_for_streaming_input)
    scheduler.add_request(part("streamed", 30))
    assert scheduler.calls["streamed"].program.stage is Stage.WAITING
    assert scheduler.integrity.faults() == []
    driver.step()
    assert scheduler.calls["streamed"].program.stage is Stage.DECODING
    assert scheduler.integrity.faults() == []
    until(driver, lambda: scheduler.num_waiting_for_streaming_input)
    scheduler.add_request(part("streamed", 0, last=True))
    while driver.in_flight:
        driver.finish()
    assert not scheduler.requests
    assert scheduler.integrity.faults() == []


@both
def test_a_part_that_came_early_is_taken_up_at_once(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    scheduler.add_request(part("streamed", 40))
    driver.step()
    scheduler.add_request(part("streamed", 30))
    request = scheduler.requests["streamed"]
    until(driver, lambda: request.num_prompt_tokens > 40)
    assert request.status is RequestStatus.WAITING
    assert scheduler.calls["streamed"].program.stage is Stage.WAITING
    assert scheduler.integrity.faults() == []
    until(driver, lambda: scheduler.num_waiting_for_streaming_input)
    assert scheduler.integrity.faults() == []


def test_the_check_notices_one_that_is_counted_as_decoding_and_does_not_run() -> None:
    scheduler, driver = started()
    scheduler.add_request(part("streamed", 40))
    until(driver, lambda: scheduler.num_waiting_for_streaming_input)
    scheduler.engine_policy.programs.table.decodes(scheduler.calls["streamed"])
    assert "'streamed' is in stage DECODING of its program, and waits for input" in scheduler.integrity.faults()


def test_a_streamed_session_that_loses_its_place_with_its_last_token_under_way() -> None:
    """vLLM 0.32 puts it into the queue that it is in already, and takes it out again: its next part is lost. 0.33 keeps it."""
    keeps = not str(installed_vllm()).startswith("0.32.")
    scheduler, driver = started(asynchronous=True)
    scheduler.add_request(part("streamed", 40, max_tokens=2))
    driver.step()
    driver.step()
    request = scheduler.requests["streamed"]
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    output = driver.in_flight.popleft()
    token = ModelRunnerOutput(["streamed"], {"streamed": 0}, sampled_token_ids=[[17]])
    scheduler.update_from_output(output, token)
    assert request.status is RequestStatus.WAITING_FOR_STREAMING_REQ
    assert len(scheduler.waiting) == (1 if keeps else 0)
    assert scheduler.integrity.faults() == []
    if keeps:
        scheduler.add_request(part("streamed", 20, last=True))
        until(driver, lambda: not scheduler.requests)
        assert len(scheduler.waiting) == 0
        assert scheduler.integrity.faults() == []


@both
@pytest.mark.parametrize("more", [False, True], ids=["waits for input", "has its next part"])
def test_a_reset_under_a_session_between_two_steps_is_refused_before_anything_has_changed(
    asynchronous: bool, more: bool
) -> None:
    """It keeps its blocks; vLLM would preempt what runs and then fail."""
    scheduler, driver = started(asynchronous)
    scheduler.add_request(part("streamed", 40))
    until(driver, lambda: scheduler.num_waiting_for_streaming_input)
    scheduler.add_request(make_request("other", 40))
    until(driver, lambda: scheduler.running)
    while driver.in_flight:
        driver.finish()
    if more:
        scheduler.add_request(part("streamed", 30))
        assert scheduler.requests["streamed"].status is RequestStatus.WAITING
    running = list(scheduler.running)
    with pytest.raises(RuntimeError, match=r"1 streamed sessions wait .* keep their KV blocks: end them, or try again"):
        scheduler.reset_prefix_cache(reset_running_requests=True)
    assert running
    assert scheduler.running == running
    scheduler.finish_requests("streamed", RequestStatus.FINISHED_ABORTED)
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert scheduler.integrity.faults() == []
