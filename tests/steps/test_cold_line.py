"""Several cold prompts in line: resume prefills behind them keep moving, and the cold ones are read as fast as alone."""

from typing import Any

import pytest

from tests.support.pinned import pinned, with_cached_contexts
from tests.support.schedulers import make_request
from vllm_agentserve.policy.call import Backlog

BYPASS = 64
STEPS = 700


def traffic(colds: int, asynchronous: bool = False, **options: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Four streams, `colds` prompts of 4000 tokens at once, and a tool result of 60 tokens every ten steps, in steps of 100
    prompt tokens; returns the steps from arrival to the first token of cold prompts and of resume prefills."""
    scheduler, driver = pinned(
        asynchronous, options={"max_bypass_steps": BYPASS, "mode": "time-sliced"} | options, num_blocks=20_000
    )
    context = with_cached_contexts(scheduler, driver, 1600)[0]
    for number in range(4):
        scheduler.add_request(make_request(f"stream-{number}", 20, max_tokens=100_000))
    driver.step()
    came: dict[str, int] = {}
    took: dict[str, int] = {}
    for step in range(STEPS):
        if step == 5:
            for number in range(colds):
                scheduler.add_request(make_request(f"cold-{number}", 4000, max_tokens=2))
                came[f"cold-{number}"] = step
        if step % 10 == 0 and step < STEPS - 20:
            prompt = context + [(step * 31 + token) % 4000 for token in range(60)]
            scheduler.add_request(make_request(f"resume-{step}", prompt, max_tokens=2))
            came[f"resume-{step}"] = step
        driver.step()
        for name in list(came):
            request = scheduler.requests.get(name)
            if request is None or request.num_output_tokens > 0:
                took[name] = step - came.pop(name)
    assert not came
    return tuple({name: steps for name, steps in took.items() if name.startswith(kind)} for kind in ("cold", "resume"))  # type: ignore[return-value]


@pytest.mark.parametrize("options", [{}, {"policy": "plas"}], ids=["fcfs", "plas"])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("colds", [1, 4])
def test_overdue_cold_prompts_do_not_close_the_queue(colds: int, asynchronous: bool, options: dict[str, Any]) -> None:
    """A cold prompt that can't begin while another is read keeps nobody waiting: every tool result is computed in the step after
    it came, and 4 x 4000 tokens beside 60 in every ten steps take no longer than (4 x 4000) / (100 - 6) steps."""
    cold, resume = traffic(colds, asynchronous, **options)
    assert max(resume.values()) <= 2
    assert max(cold.values()) <= colds * 4000 / 94 + 20


def test_time_is_not_kept_for_those_who_cannot_be_admitted() -> None:
    """One free place, and two cold prompts before a resume prefill in line: the first one gets the whole step."""
    scheduler, driver = pinned(options={"mode": "time-sliced"}, max_num_seqs=3)
    context = with_cached_contexts(scheduler, driver, 800)[0]
    for number in range(2):
        scheduler.add_request(make_request(f"stream-{number}", 20, max_tokens=10_000))
    driver.step()
    scheduler.add_request(make_request("cold", 4000))
    granted = driver.step()["cold"]
    scheduler.add_request(make_request("resume", context + list(range(60))))
    assert driver.step()["cold"] == granted


def test_a_cold_prompt_that_ends_lets_the_next_one_begin_in_the_same_step() -> None:
    scheduler, driver = pinned(options={"mode": "time-sliced"})
    scheduler.add_request(make_request("stream", 20, max_tokens=10_000))
    driver.step()
    scheduler.add_request(make_request("first", 130))
    scheduler.add_request(make_request("second", 500))
    assert driver.step()["first"] < 130
    step = driver.step()
    assert step["first"] + step["second"] > 90


def test_those_held_for_the_line_stay_in_it() -> None:
    """vLLM takes out whom it looked at, although the line changed between the two."""
    scheduler, _ = pinned(options={"mode": "time-sliced"})
    queue = scheduler.waiting
    scheduler.add_request(make_request("cold", 500))
    scheduler.add_request(make_request("other", 500))
    assert queue.peek_request().request_id == "cold"
    scheduler.engine_policy.waiting.hold_colds()
    assert not queue
    assert queue.pop_request().request_id == "cold"
    scheduler.engine_policy.waiting.reopen()
    assert [request.request_id for request in queue] == ["other"]
    assert scheduler.engine_policy.waiting.faults(scheduler.calls.values()) == []


def planned(scheduler: Any, driver: Any) -> tuple[Backlog, int]:
    """What the next step is planned for: the backlog, and the tokens of waiting resume prefills."""
    seen: list[tuple[Backlog, int]] = []
    plan = scheduler.engine_policy.controller.plan

    def watched(*given: Any, **named: Any) -> Any:
        seen.append((named["backlog"], named["waiting_resume_tokens"]))
        return plan(*given, **named)

    scheduler.engine_policy.controller.plan = watched
    driver.step()
    scheduler.engine_policy.controller.plan = plan
    return seen[0]


def test_who_cannot_be_admitted_gets_no_time_reserved() -> None:
    """Two places and both taken; then one is free: of three prompts that wait one can be admitted."""
    scheduler, driver = pinned(options={"mode": "time-sliced"}, max_num_seqs=2)
    context = with_cached_contexts(scheduler, driver, 800)[0]
    for name, length in (("stream", 10_000), ("short", 3)):
        scheduler.add_request(make_request(name, 20, max_tokens=length))
    driver.step()
    for number in range(3):
        scheduler.add_request(make_request(f"resume-{number}", context + [number] * 60))
    backlog, reserved = planned(scheduler, driver)
    assert (backlog.prompts, reserved) == (3, 0)
    assert scheduler.report()["pending_prefill_tokens"] == backlog.tokens >= 180
    while "short" in scheduler.requests:
        driver.step()
    scheduler.engine_policy.waiting.blocked = False
    assert 60 <= planned(scheduler, driver)[1] < 120


@pytest.mark.parametrize("asynchronous", [False, True])
def test_who_finds_no_blocks_gets_no_time_reserved(asynchronous: bool) -> None:
    """A stream holds 36 of 40 KV blocks: a prompt waits whose first chunk has 6, and counts again when there is room."""
    scheduler, driver = pinned(asynchronous, options={"mode": "time-sliced"}, num_blocks=41)
    scheduler.add_request(make_request("stream", 560, max_tokens=30))
    for _ in range(10):
        driver.step()
    scheduler.add_request(make_request("prompt", 320, max_tokens=2))
    assert not scheduler.engine_policy.waiting.blocked, "whether there is room is not known yet"
    driver.step()
    assert scheduler.engine_policy.waiting.blocked
    assert planned(scheduler, driver) == (Backlog(1, 320, pytest.approx(0.0, abs=1e5), crowded=True), 0)
    assert scheduler.report()["pending_prefill_tokens"] == 320
    for _ in range(60):
        driver.step()
    assert "prompt" not in scheduler.requests
    assert not scheduler.engine_policy.waiting.blocked
