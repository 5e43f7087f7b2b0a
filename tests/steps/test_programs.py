"""Programs first, on vLLM's real scheduler without a model: who is admitted when places are few."""

from time import perf_counter
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.support.calls import call_of
from tests.support.program_steps import have_run, served, started
from tests.support.schedulers import Driver, make_request, make_scheduler
from vllm_agentserve.policy.call import Chunk
from vllm_agentserve.policy.engine import NoPrograms
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.program import Stage
from vllm_agentserve.vllm_compat.scheduler import preempt


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
    assert (counts["program_new_requests"], counts["program_inferred_requests"]) == (3, 1)


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
    table = scheduler.engine_policy.programs.table
    assert not scheduler.calls
    assert table.faults(()) == []
    assert len(table) == 1
    assert scheduler.report()["programs_tracked"] == 1


def test_vllms_own_priorities_stay_in_force() -> None:
    scheduler: Any = make_scheduler(policy="priority", options={"policy": "plas"})
    assert type(scheduler.engine_policy.programs) is NoPrograms


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


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("stages", [1, 2])
def test_what_steps_take_is_charged_once(stages: int, asynchronous: bool) -> None:
    """With two pipeline stages two halves of the calls decode in turns; every program counts its own tokens."""
    options = {"policy": "plas", "program_preempt_share": 0.1}
    scheduler: Any = make_scheduler(asynchronous=asynchronous, stages=stages, options=options)
    driver = Driver(scheduler, depth=2 if asynchronous or stages > 1 else 1)
    for number in range(8):
        scheduler.add_request(make_request(str(number), 20, session=str(number)))
        if number == 3:
            driver.step()
    for _ in range(6):
        driver.step()
    table, programs = scheduler.engine_policy.programs.table, scheduler.engine_policy.programs.table._programs
    assert (table.decoding, scheduler.engine_policy.programs._alternates) == (8, stages > 1)

    def read() -> list[float]:
        tokens = [table.clock.decoded(program)[0] for program in programs.values()]
        return [
            sum(map(table.attained_ms, programs.values())),
            scheduler.engine_policy.programs.account.service_ms,
            *tokens,
        ]

    before, outputs = read(), [request.num_output_tokens for request in scheduler.requests.values()]
    rows = [driver.step() for _ in range(100)]
    assert (min(map(len, rows)), max(map(len, rows))) == ((4, 4) if stages > 1 and not asynchronous else (8, 8))
    charged, took, *tokens = (late - early for late, early in zip(read(), before, strict=True))
    assert charged == pytest.approx(took)
    really = [
        request.num_output_tokens - early for request, early in zip(scheduler.requests.values(), outputs, strict=True)
    ]
    assert tokens == pytest.approx(really, abs=1)


def test_calls_that_come_and_go_are_charged_what_steps_take() -> None:
    """With steps in flight the calls of a step are not those that decode when it is back."""
    scheduler, driver = started("plas", asynchronous=True, options={"program_preempt_share": 0.1})
    # Both charge a chunk with what the model of costs says, which learns between them: here a prompt costs nothing.
    for prices in (scheduler.engine_policy.programs, scheduler.engine_policy.controller):
        prices.prompt_ms = lambda tokens, context: 0.0
    scheduler.max_num_running_reqs = scheduler.max_num_active_reqs = 8
    charged = took = 0.0
    for step in range(120):
        if step % 3 == 0:
            scheduler.add_request(make_request(str(step), 20, max_tokens=2 + step % 11))
        table, account = scheduler.engine_policy.programs.table, scheduler.engine_policy.programs.account
        before = sum(map(table.attained_ms, table._programs.values())), account.service_ms
        row = driver.step()
        after = sum(map(table.attained_ms, table._programs.values())), account.service_ms
        if len(row) > 1:
            charged, took = charged + after[0] - before[0], took + after[1] - before[1]
    assert 0.0 < charged <= took * (1 + 1e-9)


def test_a_judge_has_the_path_of_the_longest_attempt() -> None:
    """Nothing is told: it goes on from the call before the attempts, as they do, and comes when they are through."""
    scheduler, driver = started("atlas")
    first = make_request("first", 64, max_tokens=5)
    scheduler.add_request(first)
    served(scheduler, driver)
    context = list(first.all_token_ids)
    for number in range(3):
        prompt = [*context, *range(100 * number, 100 * number + 30)]
        scheduler.add_request(make_request(f"attempt {number}", prompt, max_tokens=5 + 40 * number))
    served(scheduler, driver)
    scheduler.add_request(make_request("judge", [*context, *range(900, 960)]))
    table = scheduler.engine_policy.programs.table
    (program,) = table._programs.values()
    assert scheduler.calls["judge"].program.path_ms == program.path_ms > 0.0


def test_a_prompt_goes_on_without_a_path_where_its_program_is_forgotten() -> None:
    scheduler, driver = started("atlas", options={"program_ttl_s": 1.0})
    first = make_request("first", 64, max_tokens=300)
    scheduler.add_request(first)
    served(scheduler, driver)
    table = scheduler.engine_policy.programs.table
    table._programs["request first"].seen -= 2.0
    for name in ("goes on", "forks"):
        scheduler.add_request(make_request(name, [*first.all_token_ids, *range(40)]))
        part = scheduler.calls[name].program
        assert (part.program.key, part.path_ms) == ("request first", 0.0)


def test_a_call_that_vllm_preempts_waits_since_then() -> None:
    """Steps of decodes only tell the table no time."""
    scheduler, driver = started("plas")
    scheduler.add_request(make_request("call", 30))
    for _ in range(5):
        driver.step()
    table = scheduler.engine_policy.programs.table
    table._now -= 1000.0
    begin = perf_counter()
    preempt(scheduler, scheduler.requests["call"])
    part = scheduler.calls["call"].program
    assert begin <= part.since <= perf_counter()
    assert (part.stage, part.waited_s < 1.0) == (Stage.WAITING, True)
    assert scheduler.engine_policy.waiting.step == scheduler.current_step


def test_a_chunk_is_priced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is charged to its program is what is noted at its call."""
    scheduler: Any = make_scheduler(options={"mode": "time-sliced", "policy": "plas"})
    policy, prices = scheduler.engine_policy, iter((7.0, 11.0))
    call = call_of("a")
    charged: list[float] = []
    monkeypatch.setattr(policy.controller, "prompt_ms", lambda tokens, context: next(prices))
    monkeypatch.setattr(policy.programs, "prompt_ms", lambda tokens, context: next(prices))
    monkeypatch.setattr(policy.programs.table, "charge", lambda call, ms: charged.append(ms))
    monkeypatch.setattr(policy.programs.table, "prefills", lambda *given: None)
    policy.computes(call, Chunk(Phase.COLD_PREFILL, 10, 0), first=False, last=False)
    assert (call.computed_ms, charged) == (7.0, [7.0])


def old_and_new(policy: str = "fcfs", **options: Any) -> tuple[Any, Driver]:
    """One place, which is taken; programs `old` and `new` have had a call each, in that order, and nothing is cached."""
    scheduler, driver = started(policy, options=options, prefix_caching=False)
    have_run(scheduler, driver, "old", "new")
    scheduler.add_request(make_request("running", 20, max_tokens=5))
    driver.step()
    return scheduler, driver


def test_cold_prompts_of_the_program_that_began_first_go_first() -> None:
    scheduler, driver = old_and_new()
    scheduler.add_request(make_request("another", 40, max_tokens=2))
    scheduler.add_request(make_request("new-1", 40, max_tokens=2, session="new"))
    scheduler.add_request(make_request("new-2", 40, max_tokens=2, session="new"))
    scheduler.add_request(make_request("old", 40, max_tokens=2, session="old"))
    scheduler.add_request(make_request("child", 40, max_tokens=2, session="child", hints={"agent_parent": "old"}))
    assert served(scheduler, driver) == ["running", "old", "child", "new-1", "new-2", "another"]


def test_programs_found_by_their_prompts_go_by_age_too() -> None:
    scheduler, driver = started("fcfs", num_blocks=13)
    first = make_request("first", 60, max_tokens=10)
    scheduler.add_request(first)
    served(scheduler, driver)
    told = list(first.all_token_ids)
    # All KV blocks have been filled by others meanwhile.
    have_run(scheduler, driver, "x", "y", "z")
    scheduler.add_request(make_request("running", 20, max_tokens=5))
    driver.step()
    scheduler.add_request(make_request("later", 90, max_tokens=2))
    scheduler.add_request(make_request("second", told + list(range(20)), max_tokens=2))
    assert served(scheduler, driver) == ["running", "second", "later"]


def test_with_levels_the_order_within_one_is_the_same() -> None:
    scheduler, driver = old_and_new("plas", program_quantum_ms=1e6)
    scheduler.add_request(make_request("new", 40, max_tokens=2, session="new"))
    scheduler.add_request(make_request("old", 40, max_tokens=2, session="old"))
    assert served(scheduler, driver) == ["running", "old", "new"]


def test_an_old_program_that_never_stops_starves_nobody() -> None:
    scheduler, driver = old_and_new(max_bypass_steps=20)
    scheduler.add_request(make_request("new", 30, max_tokens=2, session="new"))
    for step in range(60):
        scheduler.add_request(make_request(f"old-{step}", 30, max_tokens=2, session="old"))
        if "new" in driver.step():
            break
    assert 15 <= step <= 26
