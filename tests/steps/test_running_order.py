"""Between two steps the prompts that are being computed are ordered like those that wait, on vLLM's real scheduler.

Chunks cost 0.1 ms per token and the target is 10 ms: beside others a step has room for some 95 prompt tokens; where nobody
decodes it has 2048.
"""

from typing import Any

import pytest

from tests.support.pinned import pinned, with_cached_contexts
from tests.support.schedulers import Driver, make_request

both = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
BATCH = {"agent_class": "batch"}
FLOOR = 16
LONG = 15_000


def started(asynchronous: bool = False, **given: Any) -> tuple[Any, Driver, list[int]]:
    """A scheduler and a context that is in its prefix cache; nothing runs."""
    options = {"mode": "time-sliced", **given.pop("options", {})}
    scheduler, driver = pinned(asynchronous, options=options, num_blocks=given.pop("num_blocks", 20_000), **given)
    (context,) = with_cached_contexts(scheduler, driver, 1600)
    while scheduler.requests:
        driver.step()
    return scheduler, driver, context


def run(scheduler: Any, driver: Driver, most: int = 400) -> list[dict[str, int]]:
    """The rows of the steps until all have ended."""
    rows = []
    while scheduler.requests:
        rows.append(driver.step())
        assert len(rows) < most
    while driver.in_flight:
        driver.finish()
    assert scheduler.integrity.faults() == []
    return rows


@both
def test_a_call_that_goes_on_does_not_wait_for_a_long_prompt_of_class_batch(asynchronous: bool) -> None:
    """300 new tokens, more than the resume budget starts with: nobody decodes, so nothing is gained by making them wait."""
    scheduler, driver, context = started(asynchronous)
    scheduler.add_request(make_request("long", LONG, max_tokens=2, hints=BATCH))
    assert driver.step() == {"long": 2048}
    scheduler.add_request(make_request("call", context + list(range(300)), max_tokens=2))
    assert driver.step() == {"long": FLOOR, "call": 300}
    run(scheduler, driver)


@both
def test_it_does_not_wait_for_one_of_its_own_class_either(asynchronous: bool) -> None:
    scheduler, driver, context = started(asynchronous)
    scheduler.add_request(make_request("long", LONG, max_tokens=2))
    driver.step()
    scheduler.add_request(make_request("call", context + list(range(300)), max_tokens=2))
    assert driver.step() == {"long": FLOOR, "call": 300}
    run(scheduler, driver)


@both
@pytest.mark.parametrize(
    ("long", "short"),
    [(BATCH, {}), ({}, {"agent_deadline_ms": 60_000}), ({"agent_deadline_ms": 600_000}, {"agent_deadline_ms": 60_000})],
    ids=["class", "deadline", "earlier deadline"],
)
def test_a_short_cold_call_goes_before_a_long_one_that_has_begun(
    long: dict[str, Any], short: dict[str, Any], asynchronous: bool
) -> None:
    scheduler, driver, _ = started(asynchronous)
    scheduler.add_request(make_request("long", LONG, max_tokens=2, hints=long))
    driver.step()
    scheduler.add_request(make_request("short", 300, max_tokens=2, hints=short))
    assert driver.step() == {"long": FLOOR, "short": 300}
    rows = run(scheduler, driver)
    assert sum(row.get("long", 0) for row in rows) >= LONG - 2048 - FLOOR


@both
@pytest.mark.parametrize("hints", [{}, BATCH], ids=["no hint", "class batch"])
def test_one_that_is_not_better_waits_as_before(hints: dict[str, Any], asynchronous: bool) -> None:
    scheduler, driver, _ = started(asynchronous)
    scheduler.add_request(make_request("long", LONG, max_tokens=2))
    driver.step()
    scheduler.add_request(make_request("short", 300, max_tokens=2, hints=hints))
    assert driver.step() == {"long": 2048}
    run(scheduler, driver)


@both
def test_a_better_one_that_takes_many_steps_keeps_its_place(asynchronous: bool) -> None:
    """vLLM asks for the worse one first in every step: it was admitted first."""
    scheduler, driver, _ = started(asynchronous)
    scheduler.add_request(make_request("long", LONG, max_tokens=2, hints=BATCH))
    driver.step()
    scheduler.add_request(make_request("better", 5000, max_tokens=2))
    rows = [driver.step() for _ in range(3)]
    assert rows == [{"long": FLOOR, "better": 2032}, {"long": FLOOR, "better": 2032}, {"long": FLOOR, "better": 936}]
    run(scheduler, driver)


@both
def test_beside_streams_the_better_one_has_the_step_but_for_the_floor(asynchronous: bool) -> None:
    scheduler, driver, _ = started(asynchronous)
    scheduler.add_request(make_request("stream", 20, max_tokens=200))
    driver.step()
    scheduler.add_request(make_request("long", LONG, max_tokens=2, hints=BATCH))
    assert driver.step() == {"stream": 1, "long": 95}
    scheduler.add_request(make_request("short", 300, max_tokens=2))
    rows = [driver.step() for _ in range(4)]
    assert all(row["long"] == FLOOR for row in rows[:3])
    assert all(70 <= row["short"] <= 80 for row in rows[:3])
    assert sum(row["short"] for row in rows) == 300
    assert sum(rows[3].values()) <= 101
    run(scheduler, driver)


def test_a_better_one_that_ends_leaves_the_rest_of_the_target_to_the_other() -> None:
    """Without decodes the step is as long as the target, for the worse one: the better one gets its token then."""
    scheduler, driver, _ = started()
    scheduler.add_request(make_request("long", LONG, max_tokens=2, hints=BATCH))
    driver.step()
    scheduler.add_request(make_request("short", 40, max_tokens=2))
    row = driver.step()
    assert row["short"] == 40
    assert 48 <= row["long"] <= 55
    run(scheduler, driver)


def test_a_long_resume_prefill_makes_way_for_a_shorter_one() -> None:
    scheduler, driver, context = started()
    scheduler.add_request(make_request("stream", 20, max_tokens=200))
    driver.step()
    scheduler.add_request(make_request("longer", context + list(range(250)), max_tokens=2))
    assert driver.step()["longer"] == 95
    scheduler.add_request(make_request("shorter", context + list(range(1000, 1060)), max_tokens=2))
    row = driver.step()
    assert row["shorter"] == 60
    assert FLOOR <= row["longer"] <= 35
    run(scheduler, driver)


def test_a_batch_resume_prefill_makes_way_for_an_interactive_cold_one() -> None:
    scheduler, driver, context = started()
    scheduler.add_request(make_request("stream", 20, max_tokens=200))
    driver.step()
    scheduler.add_request(make_request("batch", context + list(range(250)), max_tokens=2, hints=BATCH))
    assert driver.step()["batch"] == 95
    scheduler.add_request(make_request("short", 60, max_tokens=2))
    row = driver.step()
    assert row["short"] == 60
    assert FLOOR <= row["batch"] <= 35
    run(scheduler, driver)


@both
def test_nobody_makes_way_for_one_that_finds_no_place(asynchronous: bool) -> None:
    scheduler, driver, _ = started(asynchronous, max_num_seqs=1)
    scheduler.add_request(make_request("long", LONG, max_tokens=2, hints=BATCH))
    driver.step()
    scheduler.add_request(make_request("short", 300, max_tokens=2))
    assert driver.step() == {"long": 2048}
    run(scheduler, driver)


@both
def test_nobody_makes_way_for_one_that_finds_no_blocks(asynchronous: bool) -> None:
    """The long prompt and the stream have most of the 500 blocks: 8000 tokens."""
    scheduler, driver, _ = started(asynchronous, num_blocks=501, max_num_batched_tokens=1024)
    scheduler.add_request(make_request("stream", 1600, max_tokens=60))
    while not scheduler.requests["stream"].num_output_tokens:
        driver.step()
    scheduler.add_request(make_request("long", 6000, max_tokens=2, hints=BATCH))
    for _ in range(25):
        driver.step()
    scheduler.add_request(make_request("short", 4800, max_tokens=2))
    rows = [driver.step() for _ in range(20)]
    assert [row["long"] for row in rows if "short" in row] == []
    assert all(row["long"] >= 90 for row in rows)
    run(scheduler, driver)


@both
def test_what_vllm_computes_of_a_prompt_at_most_is_all_that_is_left_to_it(asynchronous: bool) -> None:
    """`long_prefill_token_threshold`: the better one cannot take more, so the other one may have the rest of the step."""
    scheduler, driver, _ = started(asynchronous, long_prefill_token_threshold=400, options={"tpot_slo_ms": 1000})
    scheduler.add_request(make_request("long", LONG, max_tokens=2, hints=BATCH))
    driver.step()
    scheduler.add_request(make_request("better", 1600, max_tokens=2))
    driver.step()
    assert driver.step() == {"long": 400, "better": 400}
    run(scheduler, driver)


@both
def test_the_bound_holds_for_one_that_has_begun(asynchronous: bool) -> None:
    """Calls with deadlines come in every step: after as many steps as the bound says they go before it no more."""
    scheduler, driver, _ = started(asynchronous, options={"max_bypass_steps": 10}, max_num_batched_tokens=256)
    scheduler.add_request(make_request("long", 2000, max_tokens=1))
    got = [driver.step()["long"]]
    for number in range(20):
        scheduler.add_request(make_request(f"call {number}", 300, max_tokens=1, hints={"agent_deadline_ms": 60_000}))
        got.append(driver.step().get("long", 0))
    while got[-1] == 0:
        got.pop()
    overtaken = got.count(FLOOR)
    assert overtaken in (9, 10)
    assert got[1 : overtaken + 1] == [FLOOR] * overtaken
    # One of the others may have begun, and has its floor beside it.
    assert all(tokens in (240, 256) for tokens in got[overtaken + 1 : -1])
    assert sum(got) == 2000
    run(scheduler, driver, 2000)


def test_vllms_own_order_stays_in_force() -> None:
    scheduler, driver, context = started(policy="priority")
    scheduler.add_request(make_request("long", LONG, max_tokens=2, hints=BATCH, priority=1))
    driver.step()
    scheduler.add_request(make_request("call", context + list(range(300)), max_tokens=2))
    assert driver.step() == {"long": 2048}
    run(scheduler, driver)


@both
def test_who_is_preempted_stays_vllms_choice(asynchronous: bool) -> None:
    """The order of `running` is not touched: the last one that was admitted loses its blocks first."""
    scheduler, driver, _ = started(asynchronous)
    scheduler.add_request(make_request("long", LONG, max_tokens=2, hints=BATCH))
    driver.step()
    scheduler.add_request(make_request("better", 5000, max_tokens=2))
    driver.step()
    driver.step()
    assert [request.request_id for request in scheduler.running] == ["long", "better"]
    run(scheduler, driver)


@both
def test_a_call_whose_grammar_is_compiled_does_not_hide_the_better_one_behind_it(asynchronous: bool) -> None:
    from vllm.v1.request import RequestStatus

    scheduler, driver, _ = started(asynchronous)
    scheduler.add_request(make_request("long", LONG, max_tokens=2, hints=BATCH))
    driver.step()
    blocked = make_request("blocked", 200, max_tokens=2)
    blocked.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    scheduler.add_request(blocked)
    scheduler.add_request(make_request("short", 300, max_tokens=2))
    assert driver.step() == {"long": FLOOR, "short": 300}
    blocked.status = RequestStatus.WAITING
    run(scheduler, driver)


@both
def test_one_that_has_begun_is_not_put_off_for_an_equal_one_that_came_earlier(asynchronous: bool) -> None:
    """The call of the older program came later and goes first in line. It goes on until its prompt is computed."""
    scheduler, driver, _ = started(asynchronous)
    scheduler.add_request(make_request("first", 20, max_tokens=1, session="old"))
    run(scheduler, driver)
    scheduler.add_request(make_request("young", 3000, max_tokens=2, session="young"))
    scheduler.add_request(make_request("old", 6000, max_tokens=2, session="old"))
    rows = [driver.step() for _ in range(3)]
    assert rows == [{"old": 2048}, {"old": 2048}, {"old": 1904, "young": 144}]
    run(scheduler, driver)


def test_the_bound_holds_for_one_that_was_preempted_and_waited() -> None:
    """It waits for a place for longer than the bound. While it is computed again, no call that came later goes before it."""
    scheduler, driver, _ = started(
        options={"max_bypass_steps": 10}, max_num_batched_tokens=64, max_num_seqs=2, prefix_caching=False
    )
    scheduler.add_request(make_request("preempted", 600, max_tokens=3))
    request = scheduler.requests["preempted"]
    while not request.num_output_tokens:
        driver.step()
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    scheduler.waiting.remove_request(request)
    for name in ("stream", "other stream"):
        scheduler.add_request(make_request(name, 10, max_tokens=20))
    driver.step()
    scheduler.waiting.add_request(request)
    rows = []
    while len(rows) < 60 and request.num_output_tokens == 1:
        if any("preempted" in row for row in rows):
            name = f"call {len(rows)}"
            scheduler.add_request(make_request(name, 40, max_tokens=1, hints={"agent_deadline_ms": 60_000}))
        rows.append(driver.step())
    chunks = [row["preempted"] for row in rows if "preempted" in row]
    assert sum(chunks) >= 600
    assert set(chunks[:-1]) == {64}
    run(scheduler, driver)


def test_one_that_was_preempted_with_a_token_under_way_is_looked_at_again() -> None:
    """vLLM passes it over until that token is there. A long prompt takes the next steps whole, so that vLLM looks at nobody."""
    scheduler, driver, _ = started(asynchronous=True)
    scheduler.add_request(make_request("call", 300, max_tokens=50))
    for _ in range(4):
        driver.step()
    scheduler.add_request(make_request("long", LONG, max_tokens=2, hints=BATCH))
    driver.step()
    request = scheduler.requests["call"]
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    assert request.num_stale_output_tokens
    rows = [driver.step() for _ in range(4)]
    assert any("call" in row for row in rows)
    run(scheduler, driver)


@both
def test_a_call_that_vllm_passes_over_does_not_close_the_line_to_a_better_one(asynchronous: bool) -> None:
    """It waits for its grammar, and not for a place or KV blocks."""
    from vllm.v1.request import RequestStatus

    scheduler, driver, context = started(asynchronous)
    scheduler.add_request(make_request("stream", 20, max_tokens=200))
    driver.step()
    scheduler.add_request(make_request("long", LONG, max_tokens=2, hints=BATCH))
    driver.step()
    blocked = make_request("blocked", context + list(range(50)), max_tokens=2)
    blocked.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    scheduler.add_request(blocked)
    driver.step()
    assert not scheduler.engine_policy.backlog().crowded
    scheduler.add_request(make_request("short", 300, max_tokens=2))
    row = driver.step()
    assert row["long"] == FLOOR
    assert row["short"] >= 70
    blocked.status = RequestStatus.WAITING
    run(scheduler, driver)


def part(name: str, tokens: int, **given: Any) -> Any:
    """A part of a streamed session."""
    return make_request(name, tokens, session=name, resumable=True, **given)


def suspended(scheduler: Any, driver: Driver, tokens: int) -> None:
    """A streamed session has answered its first part."""
    scheduler.add_request(part("streamed", tokens, max_tokens=1))
    while not scheduler.num_waiting_for_streaming_input:
        driver.step()
    while driver.in_flight:
        driver.finish()


@both
def test_the_next_part_of_a_streamed_session_does_not_wait_for_a_long_prompt_of_class_batch(asynchronous: bool) -> None:
    scheduler, driver, _ = started(asynchronous)
    suspended(scheduler, driver, 40)
    scheduler.add_request(make_request("long", LONG, max_tokens=2, hints=BATCH))
    driver.step()
    scheduler.add_request(part("streamed", 300, max_tokens=1))
    row = driver.step()
    assert row["long"] == FLOOR
    assert row["streamed"] >= 300
    assert scheduler.integrity.faults() == []


@both
def test_the_bound_of_a_streamed_session_begins_with_each_part(asynchronous: bool) -> None:
    """The first part takes longer than the bound, which says nothing of the second: calls with deadlines go before that, until it
    has been there for as long."""
    bound = 6
    scheduler, driver, _ = started(asynchronous, options={"max_bypass_steps": bound}, max_num_batched_tokens=256)
    suspended(scheduler, driver, 256 * (bound + 3))
    assert scheduler.calls["streamed"].overdue
    scheduler.add_request(part("streamed", 3000, max_tokens=1))
    got = [driver.step()["streamed"]]
    for number in range(3 * bound):
        scheduler.add_request(make_request(f"call {number}", 300, max_tokens=1, hints={"agent_deadline_ms": 60_000}))
        got.append(driver.step().get("streamed", 0))
    overtaken = got.count(FLOOR)
    assert overtaken in (bound - 2, bound - 1, bound)
    assert got[1 : overtaken + 1] == [FLOOR] * overtaken
    assert scheduler.integrity.faults() == []


def test_the_order_of_a_burst_takes_time_in_proportion_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_agentserve.policy import step_order

    scheduler, driver, _ = started(max_num_seqs=256)
    kind, asked = step_order.kind, []
    monkeypatch.setattr(step_order, "kind", lambda *given: asked.append(given) or kind(*given))
    for number in range(200):
        scheduler.add_request(make_request(f"r{number}", 8, max_tokens=1))
    assert len(driver.step()) == 200
    assert len(asked) <= 5 * 200
    run(scheduler, driver)
