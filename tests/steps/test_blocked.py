"""Waiting requests that cannot run yet, on vLLM's real scheduler without a model: they neither age nor reserve anything."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output.request import StructuredOutputRequest

from tests.support.program_steps import started as started_programs
from tests.support.schedulers import Clock, Driver, make_request, make_scheduler
from vllm_agentserve.policy.order import DECIDE_STEPS, LOOK_AHEAD

BOUND = 8
both = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def started(asynchronous: bool = False, **given: Any) -> tuple[Any, Driver]:
    scheduler: Any = make_scheduler(asynchronous=asynchronous, options={"max_bypass_steps": BOUND}, **given)
    return scheduler, Driver(scheduler, depth=2 if asynchronous else 1)


def blocked(scheduler: Any, name: str, tokens: int, **options: Any) -> Any:
    """A request whose grammar is being compiled."""
    request = make_request(name, tokens, **options)
    request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    scheduler.add_request(request)
    return request


def steps(driver: Driver, count: int) -> None:
    for _ in range(count):
        driver.step()


@both
def test_one_that_waits_for_its_grammar_is_not_overdue(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    scheduler.add_request(make_request("runs", 40))
    request = blocked(scheduler, "blocked", 40)
    steps(driver, 5 * BOUND)
    assert scheduler.counts["overdue_requests"] == 0
    assert scheduler.integrity.faults() == []
    request.status = RequestStatus.WAITING
    assert "blocked" in driver.step()


@both
def test_the_bound_holds_from_when_it_can_run(asynchronous: bool) -> None:
    """There is one place, which others take before it: one with a cached context comes in every step."""
    scheduler, driver = started(asynchronous, max_num_seqs=2)
    context = list(range(160))
    scheduler.add_request(make_request("context", context, max_tokens=1))
    steps(driver, 3)
    scheduler.add_request(make_request("runs", 40))
    request = blocked(scheduler, "blocked", 40)
    steps(driver, 3 * BOUND)
    request.status = RequestStatus.WAITING
    waited = 0
    while "blocked" not in driver.step():
        scheduler.add_request(make_request(f"resume {waited}", [*context, 3000 + waited], max_tokens=1))
        scheduler.add_request(make_request(f"again {waited}", [*context, 3500 + waited], max_tokens=1))
        waited += 1
        assert waited <= BOUND + 4
    assert scheduler.integrity.faults() == []


def test_a_blocked_cold_prompt_leaves_the_step_to_the_resume_beside_it() -> None:
    scheduler, driver = started()
    context = list(range(1600))
    scheduler.add_request(make_request("context", context, max_tokens=1))
    while scheduler.requests:
        driver.step()
    blocked(scheduler, "blocked", 4000)
    driver.step()
    plans = []
    plan = scheduler.engine_policy.controller.plan
    scheduler.engine_policy.controller.plan = lambda *args, **given: plans.append(given) or plan(*args, **given)
    scheduler.add_request(make_request("resume", [*context, *range(2000, 2200)], max_tokens=10))
    driver.step()
    assert not plans[0]["colds"]
    assert (plans[-1]["backlog"].prompts, plans[-1]["backlog"].tokens) == (1, 200)


@both
def test_a_paused_engine_lets_nobody_age(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    scheduler.add_request(make_request("runs", 40))
    steps(driver, 2)
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    scheduler.add_request(make_request("waits", 40))
    steps(driver, 5 * BOUND)
    assert scheduler.counts["overdue_requests"] == 0
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert "waits" in driver.step()


def test_a_pause_promotes_nobody() -> None:
    """A trainer pauses the engine for its weights. Who waited meanwhile has not waited for others."""
    clock = Clock()
    options = {"program_promote_ratio": 1.0, "program_quantum_ms": 100}
    scheduler, driver = started_programs("plas", options=options, max_num_seqs=1)
    scheduler.clock._clock = clock
    scheduler.add_request(make_request("runs", 40, max_tokens=1000, session="runs"))
    steps(driver, DECIDE_STEPS)
    scheduler.add_request(make_request("waits", 40, session="waits"))
    steps(driver, DECIDE_STEPS)
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    steps(driver, 2 * DECIDE_STEPS)
    clock.now += 3600.0
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    clock.now += 3600.0
    scheduler.set_pause_state(PauseState.UNPAUSED)
    steps(driver, 2 * DECIDE_STEPS)
    assert not scheduler.calls["waits"].program.promoted
    clock.now += 3600.0
    steps(driver, 2 * DECIDE_STEPS)
    assert scheduler.calls["waits"].program.promoted
    assert scheduler.integrity.faults() == []


def test_a_blocked_first_one_does_not_keep_others_from_a_place() -> None:
    options = {"program_preempt_share": 0.5, "program_promote_ratio": 100_000}
    scheduler, driver = started_programs("plas", options=options, max_num_seqs=2)
    for name in ("long", "longer"):
        scheduler.add_request(make_request(name, 64, max_tokens=1000, session=name))
    steps(driver, 25 * DECIDE_STEPS)
    blocked(scheduler, "blocked", 20, session="first")
    scheduler.add_request(make_request("new", 30, max_tokens=8, session="new"))
    order = []
    for _ in range(3 * DECIDE_STEPS):
        order += [name for name in driver.step() if name not in order]
    assert "new" in order


def test_one_that_is_never_looked_at_does_not_age() -> None:
    """All places are taken, so vLLM looks at nobody."""
    scheduler, driver = started(max_num_seqs=1)
    scheduler.add_request(make_request("runs", 40))
    request = blocked(scheduler, "blocked", 40)
    steps(driver, 5 * BOUND)
    assert scheduler.counts["overdue_requests"] == 0
    request.status = RequestStatus.WAITING
    steps(driver, 2 * BOUND)
    assert scheduler.counts["overdue_requests"] == 1


def with_adapters(scheduler: Any, most: int) -> Any:
    """Lets it use so many LoRA adapters at once, and returns what makes a request's adapter."""
    scheduler.lora_config = SimpleNamespace(max_loras=most)
    return lambda number: {"lora_request": LoRARequest(f"adapter {number}", number, "/nowhere")}


@both
def test_one_that_waits_for_an_adapter_is_not_overdue(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    adapter = with_adapters(scheduler, 1)
    scheduler.add_request(make_request("runs", 40, max_tokens=5 * BOUND, **adapter(1)))
    steps(driver, 2)
    scheduler.add_request(make_request("waits", 40, max_tokens=2, **adapter(2)))
    waited = 0
    while "waits" not in driver.step():
        waited += 1
    assert waited > 3 * BOUND
    assert scheduler.counts["overdue_requests"] == 0
    while "waits" in scheduler.requests:
        driver.step()
    assert scheduler.integrity.faults() == []


@both
def test_one_that_waits_for_an_adapter_reserves_nothing(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    adapter = with_adapters(scheduler, 1)
    scheduler.add_request(make_request("runs", 40, **adapter(1)))
    steps(driver, 2)
    scheduler.add_request(make_request("waits", 400, **adapter(2)))
    seen = []
    plan = scheduler.engine_policy.controller.plan
    scheduler.engine_policy.controller.plan = lambda *args, **given: seen.append(given) or plan(*args, **given)
    steps(driver, BOUND)
    scheduler.add_request(make_request("same adapter", 400, **adapter(1)))
    row = driver.step()
    assert "same adapter" in row
    assert [given["backlog"].prompts for given in seen[1:]] == [0] * (BOUND - 1) + [1]


@both
def test_a_grammar_that_is_ready_is_noticed_while_a_long_prompt_takes_whole_steps(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous, num_blocks=2000)
    scheduler.add_request(make_request("long", 15_000, hints={"agent_class": "batch"}))
    assert driver.step() == {"long": 2048}
    request = blocked(scheduler, "short", 300)
    assert driver.step() == {"long": 2048}
    request.structured_output_request = SimpleNamespace(grammar=SimpleNamespace())
    assert scheduler.schedule().num_scheduled_tokens["short"] == 300
    assert scheduler.integrity.faults() == []


@both
def test_a_grammar_behind_many_that_are_not_ready_is_noticed(asynchronous: bool) -> None:
    """More wait for their grammars than are looked at in a step."""
    scheduler, driver = started(asynchronous, num_blocks=2000)
    scheduler.add_request(make_request("long", 15_000, hints={"agent_class": "batch"}))
    driver.step()
    for number in range(2 * LOOK_AHEAD):
        blocked(scheduler, f"slow {number}", 300)
    request = blocked(scheduler, "short", 300)
    request.structured_output_request = SimpleNamespace(grammar=SimpleNamespace())
    rows = [scheduler.schedule().num_scheduled_tokens for _ in range(4)]
    assert any("short" in row for row in rows)
    assert scheduler.integrity.faults() == []


@both
def test_a_paused_engine_is_not_crowded(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    scheduler.add_request(make_request("runs", 40))
    steps(driver, 2)
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    scheduler.add_request(make_request("waits", 40))
    steps(driver, 2)
    assert not scheduler.engine_policy.backlog().crowded


@both
def test_an_engine_is_crowded_while_prompts_that_clients_wait_for_have_no_place(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous, max_num_seqs=1)
    scheduler.add_request(make_request("runs", 40, max_tokens=100))
    steps(driver, 2)
    scheduler.add_request(make_request("batch", 40, hints={"agent_class": "batch"}))
    steps(driver, 2)
    assert not scheduler.engine_policy.backlog().crowded
    scheduler.add_request(make_request("waits", 40))
    steps(driver, 2)
    assert scheduler.engine_policy.backlog().crowded


@both
def test_a_paused_engine_lets_nobody_age_while_others_come(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    scheduler.add_request(make_request("runs", 40))
    steps(driver, 2)
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    for number in range(3 * BOUND):
        scheduler.add_request(make_request(f"waits {number}", 40))
        driver.step()
    assert scheduler.counts["overdue_requests"] == 0
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert "waits 0" in driver.step()
    assert scheduler.integrity.faults() == []


def waiting_for_grammar(scheduler: Any, name: str, tokens: int | list[int], **options: Any) -> tuple[Any, Future]:
    """A request whose grammar another thread makes, and what that thread sets."""
    request, grammar = make_request(name, tokens, **options), Future()
    request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    request.structured_output_request = StructuredOutputRequest(StructuredOutputsParams(json_object=True), grammar)
    scheduler.add_request(request)
    return request, grammar


@both
def test_those_whose_grammar_is_not_made_are_not_looked_at(asynchronous: bool) -> None:
    """The look costs a search through the prefix cache per call and step; the one whose grammar is made runs in the next step,
    wherever it stands."""
    scheduler, driver = started(asynchronous, num_blocks=2000)
    scheduler.add_request(make_request("runs", 40, max_tokens=100))
    made = dict(waiting_for_grammar(scheduler, f"slow {number}", 30) for number in range(4 * LOOK_AHEAD))
    steps(driver, 2)
    looked, stock = [], scheduler._handle_blocked_waiting_request
    scheduler._handle_blocked_waiting_request = lambda request: looked.append(request) or stock(request)
    steps(driver, 20)
    assert looked == []
    assert len(scheduler.waiting) == len(made)
    assert scheduler.integrity.faults() == []
    last = list(made)[3 * LOOK_AHEAD]
    made[last].set_result(SimpleNamespace())
    row = scheduler.schedule().num_scheduled_tokens
    assert last.request_id in row
    assert looked == [last]
    assert scheduler.counts["overdue_requests"] == 0
    assert scheduler.integrity.faults() == []


@both
def test_a_grammar_that_cannot_be_made_is_noticed(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    request, grammar = waiting_for_grammar(scheduler, "wrong", 40)
    steps(driver, 2)
    grammar.set_exception(ValueError("no such grammar"))
    scheduler.schedule()
    # A set of ids in vLLM 0.32, by id in 0.33.
    assert [*scheduler.grammar_compile_error_reqs] == [request.request_id]


@both
def test_one_that_ends_while_its_grammar_is_made_leaves_nothing_behind(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    scheduler.add_request(make_request("runs", 40, max_tokens=100))
    request, grammar = waiting_for_grammar(scheduler, "gone", 40)
    steps(driver, 2)
    scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    grammar.set_result(SimpleNamespace())
    steps(driver, 2)
    assert not scheduler.waiting
    assert scheduler.integrity.faults() == []


def test_one_whose_grammar_is_made_may_still_wait_for_an_adapter() -> None:
    scheduler, driver = started()
    adapter = with_adapters(scheduler, 1)
    scheduler.add_request(make_request("runs", 40, max_tokens=20, **adapter(1)))
    _, grammar = waiting_for_grammar(scheduler, "waits", 40, max_tokens=2, **adapter(2))
    steps(driver, 2)
    grammar.set_result(SimpleNamespace(accept_tokens=lambda *given: True, is_terminated=lambda: False))
    rows = [driver.step() for _ in range(30)]
    assert "waits" not in rows[0]
    assert any("waits" in row for row in rows)
    assert scheduler.integrity.faults() == []


def test_one_that_ended_before_its_grammar_was_made_is_not_remembered() -> None:
    scheduler, driver = started()
    scheduler.add_request(make_request("runs", 40, max_tokens=100))
    request, grammar = waiting_for_grammar(scheduler, "gone", 40)
    steps(driver, 2)
    scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    grammar.set_result(SimpleNamespace())
    scheduler.add_request(make_request("next", 40))
    driver.step()
    assert not scheduler.engine_policy.waiting._became_ready


@both
def test_what_others_have_cached_is_noticed_behind_many_whose_grammar_is_not_made(asynchronous: bool) -> None:
    """As soon as it is cached for those that can run, and for the others when their grammar is made."""
    scheduler, driver = started(asynchronous, num_blocks=2000, max_num_seqs=1)
    context = list(range(1600))
    made = [waiting_for_grammar(scheduler, f"slow {number}", [*context, number])[1] for number in range(LOOK_AHEAD)]
    scheduler.add_request(make_request("first", context, max_tokens=100))
    scheduler.add_request(make_request("second", [*context, 3000]))
    assert driver.step() == {"first": 1600}
    assert not scheduler.waiting.key("second").cold
    made[7].set_result(SimpleNamespace())
    driver.step()
    assert not scheduler.waiting.key("slow 7").cold
    assert scheduler.integrity.faults() == []


@both
def test_those_that_wait_for_an_adapter_are_not_looked_at(asynchronous: bool) -> None:
    """As those that wait for their grammars are not; when one can be used, the first of them in order that can get it, then all
    others of the same adapter."""
    scheduler, driver = started(asynchronous, num_blocks=2000)
    adapter = with_adapters(scheduler, 1)
    scheduler.add_request(make_request("runs", 40, max_tokens=30, **adapter(1)))
    steps(driver, 2)
    for number in range(2 * LOOK_AHEAD):
        scheduler.add_request(make_request(f"two {number}", 30, max_tokens=2, **adapter(2 + number % 2)))
    steps(driver, 2)
    looked, stock = [], scheduler._handle_blocked_waiting_request
    scheduler._handle_blocked_waiting_request = lambda request: looked.append(request) or stock(request)
    steps(driver, 20)
    assert looked == []
    assert scheduler.integrity.faults() == []
    order: list[str] = []
    for _ in range(60):
        order += [name for name in driver.step() if name not in ("runs", *order)]
        assert scheduler.integrity.faults() == []
    assert order[:LOOK_AHEAD] == [f"two {number}" for number in range(0, 2 * LOOK_AHEAD, 2)]
    assert order[LOOK_AHEAD:] == [f"two {number}" for number in range(1, 2 * LOOK_AHEAD, 2)]
    assert not scheduler.requests
    assert len(looked) <= 4 * LOOK_AHEAD


@both
def test_of_many_whose_grammars_are_made_at_once_some_are_taken_in_each_step(asynchronous: bool) -> None:
    """Thousands in one step would take as long as many steps. All of them have their turn."""
    scheduler, driver = started(asynchronous, num_blocks=2000, max_num_seqs=2)
    scheduler.add_request(make_request("runs", 40, max_tokens=1000))
    made = [waiting_for_grammar(scheduler, f"slow {number}", 30, max_tokens=2)[1] for number in range(3 * LOOK_AHEAD)]
    steps(driver, 2)
    for grammar in made:
        grammar.set_result(SimpleNamespace(accept_tokens=lambda *given: True, is_terminated=lambda: False))
    driver.step()
    assert len(scheduler.waiting) - sum(call.unready for call in scheduler.calls.values()) <= 2 * LOOK_AHEAD
    steps(driver, 2)
    assert not any(call.unready for call in scheduler.calls.values())
    assert scheduler.integrity.faults() == []
