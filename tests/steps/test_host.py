"""Host memory on vLLM's real scheduler and connector without a model: what comes back, when, and that it is what was computed."""

import random
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.support.host_calls import OPTIONS, ask, finished, prompt, random_calls, started
from tests.support.host_driver import HostDriver
from tests.support.pinned import PinnedController
from tests.support.schedulers import make_request, make_scheduler
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.scheduler.load_stats import FOUND
from vllm_agentserve.vllm_compat.cpu_offload import BlockCopies
from vllm_agentserve.vllm_compat.host import Host, NoHost


def pushed_out(scheduler: Any, driver: HostDriver, *names: str, tokens: int = 400) -> None:
    """These programs have had a call each, and others have taken all their KV blocks since."""
    for name in names:
        ask(scheduler, name, tokens)
        finished(scheduler, driver)
    for number in range(3):
        ask(scheduler, f"other {number}", 900)
        finished(scheduler, driver)


def plans_of(scheduler: Any) -> list[dict[str, Any]]:
    """What steps are planned for from now on."""
    controller, plans = scheduler.engine_policy.controller, []
    plan = controller.plan

    def planned(*arguments: Any, **given: Any) -> Any:
        plans.append(given)
        return plan(*arguments, **given)

    controller.plan = planned
    return plans


def test_a_context_comes_back_from_the_host() -> None:
    scheduler, driver = started()
    pushed_out(scheduler, driver, "a")
    again = ask(scheduler, "a", 440, number=1)
    assert driver.step() == {}, "its blocks are being filled"
    # Its last block was not full: 400 tokens of the prompt and 3 of the answer.
    assert driver.step() == {"a-1": 40}
    call = scheduler.calls["a-1"]
    assert (call.cached_tokens, call.phase) == (400, Phase.RESUME_PREFILL)
    assert again.prefill_stats is None or again.prefill_stats.num_external_cached_tokens == 400
    finished(scheduler, driver)
    assert scheduler.counts["host_restored_requests"] == 1
    report = scheduler.report()
    assert scheduler.counts["host_stored_tokens"] == report["host_used_tokens"] > 3000
    assert report["host_pool_tokens"] == 8192
    assert report["host_restoring_requests"] == 0
    assert report["host_restore_tokens_per_second"] > 0
    assert driver.memory.tier.restore_ms(400) is not None


def test_where_the_contexts_of_returning_calls_were() -> None:
    """Without a copy in host memory, with one, and in the KV cache. 400 tokens of the prompt and 4 of the answer; 3 of these have
    KV."""
    scheduler, driver = started(load_control=True)

    def counted() -> tuple[float, ...]:
        return tuple(scheduler.counts.get(f"returning_context_tokens:{found}", 0) for found in FOUND)

    pushed_out(scheduler, driver, "a")
    assert counted() == (0, 0, 0)
    ask(scheduler, "a", 440, number=1)
    finished(scheduler, driver)
    assert counted() == (0, 400, 4)
    ask(scheduler, "a", 480, number=2)
    finished(scheduler, driver)
    cache, host, computed = counted()
    assert (host, cache + computed) == (400, 4 + 444)
    assert cache >= 432


def test_the_same_prompt_again_comes_from_the_host_but_for_its_last_token() -> None:
    scheduler, driver = started(load_control=True)
    pushed_out(scheduler, driver, "a")
    ask(scheduler, "a", 400, number=1)
    finished(scheduler, driver)
    found = [scheduler.counts.get(f"returning_context_tokens:{where}", 0) for where in FOUND]
    assert found == [0, 399, 1]


def test_a_context_that_a_reset_has_taken_back_was_nowhere() -> None:
    scheduler, driver = started(load_control=True, holds=True)
    driver.holds = False
    pushed_out(scheduler, driver, "a")
    driver.holds = True
    ask(scheduler, "a", 440, number=1)
    driver.step()
    driver.copies.let_go()
    driver.step()
    if scheduler.calls["a-1"].cached_tokens is None:
        scheduler.reset_prefix_cache(reset_running_requests=True)
    driver.holds = False
    finished(scheduler, driver)
    found = [scheduler.counts.get(f"returning_context_tokens:{where}", 0) for where in FOUND]
    assert found == [0, 0, 404]


def test_answers_are_kept_too() -> None:
    scheduler, driver = started()
    first = ask(scheduler, "a", 400, max_tokens=50)
    finished(scheduler, driver)
    pushed_out(scheduler, driver)
    tokens = [*first.all_token_ids][:440]
    scheduler.add_request(make_request("again", tokens + [5] * 20, max_tokens=4))
    driver.step()
    assert driver.step() == {"again": 460 - 432}
    finished(scheduler, driver)


def test_copies_that_were_changed_by_one_place_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check is worth."""
    copy = BlockCopies._copy

    def shifted(self: BlockCopies, job: Any) -> int:
        parts = [part._replace(slots=part.slots + (not job.stores)) for part in job.parts]
        return copy(self, job._replace(parts=parts))

    scheduler, driver = started()
    monkeypatch.setattr(BlockCopies, "_copy", shifted)
    pushed_out(scheduler, driver, "a")
    ask(scheduler, "a", 440, number=1)
    with pytest.raises(AssertionError, match="a-1 reads something else at token 0 of 400"):
        finished(scheduler, driver)


def test_copies_that_nobody_waits_for_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, driver = started(holds=True)
    monkeypatch.setattr(driver.copies, "wait", lambda job_ids: None)
    ask(scheduler, "a", 400)
    for _ in range(8):
        driver.step()
    ask(scheduler, "b", 1000)
    for _ in range(8):
        driver.step()
    driver.copies.let_go()
    driver.step()
    ask(scheduler, "a", 440, number=1)
    driver.step()
    driver.copies.let_go()
    for _ in range(4):
        driver.step()
    assert driver.wrong


def test_a_restored_prompt_waits_as_what_it_is() -> None:
    """Its key counts what the host has: it goes before a cold prompt that came first."""
    scheduler, driver = started()
    pushed_out(scheduler, driver, "a")
    ask(scheduler, "cold", 600)
    ask(scheduler, "a", 420, number=1)
    assert [request.request_id for request in scheduler.waiting] == ["a-1", "cold-0"]
    assert scheduler.waiting.key("a-1").uncached == 20
    finished(scheduler, driver)


def test_looking_the_host_up_changes_nothing() -> None:
    scheduler, driver = started()
    pushed_out(scheduler, driver, "a")
    request = make_request("look", prompt("a", 800))
    manager = scheduler.connector.connector_scheduler.manager
    before = [*manager._policy.chunks.items()], [*manager._policy._ranks.items()]
    assert scheduler.host.restorable_tokens(request, 0) == 400
    assert scheduler.host.restorable_tokens(request, 160) == 240
    assert scheduler.host.restorable_tokens(make_request("whole", prompt("a", 400)), 0) == 399
    assert scheduler.host.restorable_tokens(make_request("other", prompt("x", 400)), 0) == 0
    for tokens, found in ((15, 0), (16, 15), (17, 16), (40, 32)):
        assert scheduler.host.restorable_tokens(make_request(str(tokens), prompt("a", tokens)), 0) == found
    assert ([*manager._policy.chunks.items()], [*manager._policy._ranks.items()]) == before


def test_tokens_are_kept_for_a_restored_prompt_beside_a_cold_one() -> None:
    """Steps plan for it although it is in no list of waiting calls any more."""
    scheduler, driver = started(num_blocks=129, tpot_slo_ms=50.0, first_chunk_tokens=64)
    pushed_out(scheduler, driver, "a")
    ask(scheduler, "stream", 32, max_tokens=200)
    driver.step()
    ask(scheduler, "a", 440, number=1)
    ask(scheduler, "cold", 800)
    driver.step()
    policy = scheduler.engine_policy
    assert [call.name for call in policy.restored()] == ["a-1"]
    assert policy.backlog().tokens >= 40
    plans = plans_of(scheduler)
    row = driver.step()
    assert plans[0]["waiting_resume_tokens"] >= 40
    assert plans[0]["resumes"]
    assert row["a-1"] == 40
    finished(scheduler, driver)


def test_blocks_are_not_filled_for_prompts_without_a_place() -> None:
    scheduler, driver = started(num_blocks=129, max_num_seqs=2)
    pushed_out(scheduler, driver, "a", "b", "c", tokens=300)
    ask(scheduler, "stream", 32, max_tokens=60)
    driver.step()
    for name in "abc":
        ask(scheduler, name, 330, number=1)
    driver.step()
    assert [call.name for call in scheduler.engine_policy.restoring] == ["a-1"]
    assert not scheduler.kv_cache_manager.get_block_ids("b-1")[0]
    plans = plans_of(scheduler)
    driver.step()
    assert plans[0]["waiting_resume_tokens"] == 330 - 288, "the free place is that of the first"
    finished(scheduler, driver)


def test_a_restored_prompt_that_waits_for_a_better_cold_one_holds_nobody_up() -> None:
    """vLLM looks at it before those that have no KV blocks, and at nobody behind one that gets no tokens. The cold one comes
    while it is copied back, which takes a step longer with steps in flight."""
    scheduler, driver = started(500, 2048, asynchronous=True, controller=PinnedController, tpot_slo_ms=10)
    ask(scheduler, "a", 400)
    finished(scheduler, driver)
    for number in range(9):
        ask(scheduler, f"other {number}", 900)
        finished(scheduler, driver)
    ask(scheduler, "b", 200)
    finished(scheduler, driver)
    ask(scheduler, "stream", 32, max_tokens=400)
    driver.step()
    ask(scheduler, "a", 400 + 1500, number=1, agent_class="batch")
    driver.step()
    cold = ask(scheduler, "cold", 3000)
    for _ in range(3):
        driver.step()
    assert [call.name for call in scheduler.engine_policy.restored()] == ["a-1"]
    ask(scheduler, "b", 210, number=1)
    rows = [driver.step() for _ in range(3)]
    assert any("b-1" in row for row in rows)
    assert all("a-1" not in row for row in rows)
    assert cold.num_computed_tokens < 2000
    finished(scheduler, driver)


def test_vllms_own_order_is_left_as_it_is() -> None:
    """Mode stock admits whom vLLM would; prompts come back, and are counted."""
    scheduler, driver = started(mode="stock", max_num_seqs=2)
    pushed_out(scheduler, driver, "a", "b", tokens=300)
    for name in "ab":
        ask(scheduler, name, 330, number=1)
    driver.step()
    assert [call.name for call in scheduler.engine_policy.restoring] == ["a-1", "b-1"]
    assert driver.step() == {"a-1": 42, "b-1": 42}
    finished(scheduler, driver)
    assert scheduler.counts["host_restored_requests"] == 2


def test_a_prompt_that_finds_no_blocks_is_not_counted() -> None:
    scheduler, driver = started(num_blocks=65)
    pushed_out(scheduler, driver, "a")
    ask(scheduler, "stream", 900, max_tokens=60)
    driver.step()
    ask(scheduler, "a", 440, number=1)
    driver.step()
    assert not scheduler.engine_policy.restoring
    assert scheduler.counts["host_restored_requests"] == 0
    finished(scheduler, driver)
    assert scheduler.counts["host_restored_requests"] == 1


def test_aborted_while_its_blocks_are_filled() -> None:
    scheduler, driver = started(holds=True)
    scheduler.add_request(make_request("a-0", prompt("a", 400), max_tokens=4, session="a"))
    for _ in range(6):
        driver.step()
    driver.copies.let_go()
    for number in range(3):
        ask(scheduler, f"other {number}", 900)
        for _ in range(8):
            driver.step()
            driver.copies.let_go()
    ask(scheduler, "a", 440, number=1)
    driver.step()
    assert [call.name for call in scheduler.engine_policy.restoring] == ["a-1"]

    scheduler.finish_requests("a-1", RequestStatus.FINISHED_ABORTED)
    assert not scheduler.engine_policy.restoring
    driver.step()
    # Its blocks are held until nobody writes them any more.
    assert scheduler.kv_cache_manager.get_block_ids("a-1")[0]
    driver.copies.let_go()
    finished(scheduler, driver)
    assert not driver.memory._tokens


def test_a_reset_forgets_the_host_too() -> None:
    scheduler, driver = started()
    pushed_out(scheduler, driver, "a")
    assert scheduler.host.used_tokens
    assert scheduler.reset_prefix_cache()
    assert scheduler.host.used_tokens == 0
    ask(scheduler, "a", 440, number=1)
    assert driver.step() == {"a-1": 440}
    finished(scheduler, driver)


def test_a_reset_takes_restored_prompts_back_that_wait_for_a_step() -> None:
    scheduler, driver = started()
    pushed_out(scheduler, driver, "a")
    ask(scheduler, "a", 440, number=1)
    driver.step()
    assert len(scheduler.engine_policy.restored()) == 1
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert not scheduler.engine_policy.restoring
    assert driver.step() == {"a-1": 440}
    finished(scheduler, driver)


def test_a_reset_is_refused_before_anybody_loses_a_place_while_blocks_of_an_aborted_call_are_filled() -> None:
    scheduler, driver = started()
    pushed_out(scheduler, driver, "a")
    ask(scheduler, "stream", 32, max_tokens=100)
    driver.step()
    driver.holds = True
    ask(scheduler, "a", 440, number=1)
    driver.step()
    scheduler.finish_requests("a-1", RequestStatus.FINISHED_ABORTED)
    with pytest.raises(RuntimeError, match="is being copied back from host memory"):
        scheduler.reset_prefix_cache(reset_running_requests=True)
    assert [request.request_id for request in scheduler.running] == ["stream-0"]
    driver.copies.let_go()
    driver.step()
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    driver.holds = False
    finished(scheduler, driver)


def test_a_reset_can_follow_another_one() -> None:
    """The engine has nothing to do in between, so that it runs no step. What was being stored then is still waited for."""
    scheduler, driver = started(holds=True)
    ask(scheduler, "a", 400)
    for _ in range(8):
        driver.step()
    assert not scheduler.running
    assert driver.copies.held
    for _ in range(3):
        assert scheduler.reset_prefix_cache()
    ask(scheduler, "b", 440)
    assert driver.step() == {"b-0": 440}
    assert driver.copies.waited
    driver.holds = False
    finished(scheduler, driver)


def test_a_prompt_that_is_computed_whole_in_any_case_is_no_restored_one() -> None:
    scheduler, driver = started()
    pushed_out(scheduler, driver, "a")
    request = make_request("all", prompt("a", 440), max_tokens=4, session="a")
    request.skip_reading_prefix_cache = True  # as with prompt_logprobs
    scheduler.add_request(request)
    assert scheduler.waiting.key("all").cold
    assert driver.step() == {"all": 440}
    finished(scheduler, driver)


def test_headroom_that_retention_set_for_another_call_does_not_hold_for_a_restored_one() -> None:
    scheduler, driver = started(kv_retain=True)
    pushed_out(scheduler, driver, "a")
    asked = []
    others = driver.memory._others
    for feature in others:
        if type(feature).__name__ == "Retain":
            before = feature.asked
            feature.asked = lambda call, computed, restored, before=before: (
                asked.append((call.name, computed, restored)),
                before(call, computed, restored),
            )
    ask(scheduler, "a", 440, number=1)
    driver.step()
    assert asked == [("a-1", 400, 400)]
    finished(scheduler, driver)


def test_other_requests_are_served_as_without_a_host() -> None:
    scheduler, driver = started()
    plain: Any = make_scheduler(options=OPTIONS, num_blocks=65)
    assert type(scheduler.host) is Host
    assert type(plain.host) is NoHost
    for name in "abc":
        ask(scheduler, name, 100)
    assert driver.step() == {"a-0": 100, "b-0": 100, "c-0": 100}
    finished(scheduler, driver)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("chunks", [40, 512], ids=["small host", "large host"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_whatever_happens_nobody_reads_another_context(seed: int, chunks: int, asynchronous: bool) -> None:
    """Calls of many programs, aborts, preemptions, resets, and copies that are late."""
    rng = random.Random(seed)
    scheduler, driver = started(
        num_blocks=49,
        chunks=chunks,
        holds=True,
        max_num_seqs=5,
        kv_retain=seed > 0,
        tpot_slo_ms=50.0,
        asynchronous=asynchronous,
    )

    random_calls(scheduler, driver, rng)
    if chunks > 40:
        assert scheduler.counts["host_restored_requests"] > 3
    driver.close()
