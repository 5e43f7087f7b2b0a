"""Hints on vLLM's real scheduler without a model: they order requests, and a client that lies starves nobody."""

from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.support.program_steps import have_run, served, started
from tests.support.schedulers import Driver, make_request, make_scheduler
from vllm_agentserve.policy.hints import INVALID_HEADER
from vllm_agentserve.scheduler.vllm_hooks import VllmHooks
from vllm_agentserve.vllm_compat import hooks


def one_place(policy: str = "fcfs", **options: Any) -> tuple[Any, Driver]:
    """A scheduler of one place, which is taken for some steps."""
    scheduler, driver = started(policy, options=options)
    scheduler.add_request(make_request("running", 20, max_tokens=5))
    driver.step()
    return scheduler, driver


@pytest.mark.parametrize("policy", ["fcfs", "plas", "atlas"])
def test_batch_waits_for_everybody_else(policy: str) -> None:
    scheduler, driver = one_place(policy)
    scheduler.add_request(make_request("batch", 30, max_tokens=2, hints={"agent_class": "batch"}))
    scheduler.add_request(make_request("later", 600, max_tokens=2))
    scheduler.add_request(make_request("said", 30, max_tokens=2, hints={"agent_class": "interactive"}))
    assert served(scheduler, driver) == ["running", "later", "said", "batch"]


def test_a_batch_program_waits_whatever_it_has_received() -> None:
    scheduler, driver = started("plas")
    have_run(scheduler, driver, "old", tokens=400)
    scheduler.add_request(make_request("running", 20, max_tokens=5))
    driver.step()
    scheduler.add_request(make_request("new", 30, max_tokens=2, session="n", hints={"agent_class": "batch"}))
    scheduler.add_request(make_request("old", 30, max_tokens=2, session="old"))
    assert served(scheduler, driver) == ["running", "old", "new"]


def test_earlier_deadlines_go_first_among_equals() -> None:
    scheduler, driver = one_place()
    for name, deadline in (("none", None), ("late", 60_000), ("soon", 100)):
        hints = None if deadline is None else {"agent_deadline_ms": deadline}
        scheduler.add_request(make_request(name, 30, max_tokens=2, hints=hints))
    assert served(scheduler, driver) == ["running", "soon", "late", "none"]


def test_larger_priorities_go_first_among_equals() -> None:
    """A gateway's `priority` is the same hint; deadlines decide among calls of one priority."""
    scheduler, driver = one_place()
    later = {"agent_priority": 2, "agent_deadline_ms": 60_000}
    for name, hints in (
        ("none", None),
        ("behind", {"agent_priority": -1}),
        ("batch", {"agent_priority": 9, "agent_class": "batch"}),
        ("later", later),
        ("sooner", later | {"agent_deadline_ms": 100}),
        ("gateway", {"agentic_context": '{"program_id": "p", "priority": 3}'}),
    ):
        scheduler.add_request(make_request(name, 30, max_tokens=2, hints=hints))
    assert served(scheduler, driver) == ["running", "gateway", "sooner", "later", "none", "behind", "batch"]


@pytest.mark.parametrize("hints", [{"agent_priority": 1000}, {"agent_deadline_ms": 1}], ids=["priority", "deadline"])
def test_no_hint_lifts_a_call_over_its_level(hints: dict[str, int]) -> None:
    scheduler, driver = started("plas")
    have_run(scheduler, driver, "old", tokens=400)
    scheduler.add_request(make_request("running", 20, max_tokens=5))
    driver.step()
    scheduler.add_request(make_request("old", 30, max_tokens=2, session="old", hints=hints))
    scheduler.add_request(make_request("new", 30, max_tokens=2, session="new"))
    assert served(scheduler, driver) == ["running", "new", "old"]


def test_a_client_that_always_lies_starves_nobody() -> None:
    scheduler, driver = one_place("plas", max_bypass_steps=20, program_promote_ratio=100_000)
    scheduler.add_request(make_request("honest", 30, max_tokens=2, session="honest"))
    for step in range(60):
        liar = {"agent_priority": 9, "agent_deadline_ms": 1, "agent_class": "interactive", "agent_thread": f"{step}"}
        scheduler.add_request(make_request(f"liar-{step}", 30, max_tokens=2, session=f"{step}", hints=liar))
        if "honest" in driver.step():
            break
    assert 15 <= step <= 26


def test_batch_is_not_starved_for_ever() -> None:
    scheduler, driver = one_place(max_bypass_steps=20)
    scheduler.add_request(make_request("batch", 30, max_tokens=2, hints={"agent_class": "batch"}))
    for step in range(60):
        scheduler.add_request(make_request(f"other-{step}", 30, max_tokens=2))
        if "batch" in driver.step():
            break
    assert 15 <= step <= 26


def test_a_sub_agent_is_charged_to_its_parent() -> None:
    scheduler, driver = started("plas")
    have_run(scheduler, driver, "parent", tokens=400)
    scheduler.add_request(make_request("running", 20, max_tokens=5))
    driver.step()
    child = {"agent_parent": "parent"}
    scheduler.add_request(make_request("child", 30, max_tokens=2, session="child", hints=child))
    scheduler.add_request(make_request("anonymous child", 30, max_tokens=2, hints=child))
    scheduler.add_request(make_request("new", 30, max_tokens=2, session="new"))
    assert served(scheduler, driver) == ["running", "new", "child", "anonymous child"]
    assert scheduler.report()["programs_tracked"] == 3


def test_threads_have_paths_of_their_own() -> None:
    """With `atlas`: a thread that has had little goes before the thread beside it that has had much."""
    scheduler, driver = started("atlas")
    for thread, tokens in (("long", 400), ("short", 2)):
        hints = {"agent_thread": thread}
        # Both begin at the same time, so neither follows the other.
        request = make_request(f"warm-{thread}", 30, session="s", hints=hints)
        scheduler.add_request(request)
        scheduler.engine_policy.programs.table.charge(scheduler.calls[f"warm-{thread}"], float(tokens))
    scheduler.finish_requests(["warm-long", "warm-short"], RequestStatus.FINISHED_ABORTED)
    scheduler.add_request(make_request("running", 20, max_tokens=5))
    driver.step()
    for thread in ("long", "short"):
        scheduler.add_request(make_request(thread, 30, max_tokens=2, session="s", hints={"agent_thread": thread}))
    assert served(scheduler, driver) == ["running", "short", "long"]


def test_invalid_hints_are_counted_and_said_once_per_kind(caplog: pytest.LogCaptureFixture) -> None:
    scheduler, driver = started("fcfs")
    for number in range(5):
        hints = {"agent_class": "urgent", "agent_deadline_ms": -number, f"agent_{number}": 1}
        scheduler.add_request(make_request(f"r{number}", 30, max_tokens=2, hints=hints))
    assert len(served(scheduler, driver)) == 5
    assert scheduler.counts["invalid_hints"] == 15
    said = [record.getMessage() for record in caplog.records if "hint" in record.getMessage()]
    assert len(said) == 3
    assert any("must be 'interactive' or 'batch'" in line for line in said)
    assert not any("urgent" in line or "agent_4" in line for line in said)  # what clients send stays out of the log


def test_a_misspelt_hint_is_named_in_its_warning(caplog: pytest.LogCaptureFixture) -> None:
    scheduler, _ = started("fcfs")
    for number, name in enumerate(("agent_clas", "agent_parents", "agent_\n" + "x" * 500)):
        scheduler.add_request(make_request(f"r{number}", 30, max_tokens=2, hints={name: "batch"}))
    (said,) = [record.getMessage() for record in caplog.records if "hint" in record.getMessage()]
    assert "vllm_xargs['agent_clas'] must be named agent_" in said
    caplog.clear()
    scheduler, _ = started("fcfs")
    scheduler.add_request(make_request("r", 30, max_tokens=2, hints={"agent_\n" + "x" * 500: "batch"}))
    (said,) = [record.getMessage() for record in caplog.records if "hint" in record.getMessage()]
    assert "\n" not in said
    assert "x" * 40 not in said


def test_a_header_is_named_in_its_warning_and_hides_no_misspelt_hint(caplog: pytest.LogCaptureFixture) -> None:
    scheduler, _ = started("fcfs")
    invalid = "x-claude-code-session-id: " + "x" * 300
    for number, hints in enumerate(({INVALID_HEADER: invalid}, {INVALID_HEADER: invalid}, {"agent_clas": "batch"})):
        scheduler.add_request(make_request(f"r{number}", 30, max_tokens=2, hints=hints))
    said = [record.getMessage() for record in caplog.records if "hint" in record.getMessage()]
    assert len(said) == 2
    assert "ignored: header 'x-claude-code-session-id' must be a string" in said[0]
    assert "ignored: vllm_xargs['agent_clas'] must be named agent_" in said[1]
    assert "xxx" not in said[0]


def test_nothing_is_kept_of_requests_that_are_gone() -> None:
    scheduler, driver = started("plas")
    hints = {"agent_parent": "p", "agent_thread": "t", "agent_deadline_ms": 5, "agent_class": "batch"}
    for number in range(20):
        scheduler.add_request(make_request(f"r{number}", 30, max_tokens=2, session=f"{number}", hints=hints))
    served(scheduler, driver)
    assert not scheduler.calls


@pytest.mark.parametrize(("strict", "refused"), [(True, True), (False, False)])
def test_strict_hints_refuse_the_request_where_it_comes_in(strict: bool, refused: bool) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    hooks.refuse_invalid_hints(VllmHooks)
    scheduler: Any = make_scheduler(options={"strict_hints": strict})
    processor = InputProcessor.__new__(InputProcessor)
    processor.vllm_config = scheduler.vllm_config
    processor.vllm_config.scheduler_config.scheduler_cls = "vllm_agentserve.AgentScheduler"
    parameters = make_request("r", 30, hints={"agent_class": "urgent"}).sampling_params
    # Without strictness vLLM's own code goes on, and stops where this half-made object ends.
    expected: Any = VLLMValidationError if refused else AttributeError
    with pytest.raises(expected, match="agent_class" if refused else None):
        processor.process_inputs("r", {"prompt_token_ids": [1]}, parameters, ("generate",))


def test_stock_servers_take_no_notice() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    hooks.refuse_invalid_hints(VllmHooks)
    scheduler: Any = make_scheduler(options={"strict_hints": True})
    processor = InputProcessor.__new__(InputProcessor)
    processor.vllm_config = scheduler.vllm_config
    processor.vllm_config.scheduler_config.scheduler_cls = None
    parameters = make_request("r", 3, hints={"agent_class": "urgent"}).sampling_params
    with pytest.raises(AttributeError):
        processor.process_inputs("r", {"prompt_token_ids": [1]}, parameters, ("generate",))
