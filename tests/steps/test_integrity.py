"""The check of all state on vLLM's real scheduler: every fault it can name is planted once, and said."""

import logging
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.calls import call_of
from tests.support.lane_driver import started
from tests.support.schedulers import Driver, make_request, make_scheduler
from vllm_agentserve.policy.order import Urgency
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.scheduler import integrity

Plant = Callable[[Any], None]


def busy() -> Any:
    """Two that run, two that wait, of two programs."""
    scheduler: Any = make_scheduler(options={"mode": "time-sliced", "policy": "plas"}, max_num_seqs=2)
    driver = Driver(scheduler)
    for name in "ab":
        scheduler.add_request(make_request(name, 40, session=name))
    for _ in range(3):
        driver.step()
    for name in "cd":
        scheduler.add_request(make_request(name, 50, session="a"))
    assert integrity_of(scheduler) == []
    return scheduler


def integrity_of(scheduler: Any) -> list[str]:
    return scheduler.integrity.faults()


def blocks_of(scheduler: Any, name: str) -> Any:
    return scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks[name]


def leak(scheduler: Any) -> None:
    scheduler.kv_cache_manager.block_pool.get_new_blocks(1)


def lose_the_holder(scheduler: Any) -> None:
    del scheduler.requests["a"]


def hold_twice(scheduler: Any) -> None:
    blocks_of(scheduler, "b").append(blocks_of(scheduler, "a")[0])


def free_in_use(scheduler: Any) -> None:
    block = blocks_of(scheduler, "a")[0]
    scheduler.kv_cache_manager.block_pool.free_block_queue.append(block)


def miscount_free(scheduler: Any) -> None:
    scheduler.kv_cache_manager.block_pool.free_block_queue.num_free_blocks += 1


def forget_a_hash(scheduler: Any) -> None:
    pool = scheduler.kv_cache_manager.block_pool
    block = blocks_of(scheduler, "a")[0]
    pool.cached_block_hash_to_block.pop(block.block_hash, block.block_id)


def run_twice(scheduler: Any) -> None:
    scheduler.running.append(scheduler.running[0])


def run_and_wait(scheduler: Any) -> None:
    scheduler.running.append(scheduler.requests["c"])


def remember_a_prefill(scheduler: Any) -> None:
    scheduler.engine_policy.prefilling.append(call_of("ghost"))


def forget_a_prefill(scheduler: Any) -> None:
    scheduler.calls["c"].served_as = Phase.COLD_PREFILL


def forget_to_leave_the_queue(scheduler: Any) -> None:
    ghost = call_of("ghost")
    scheduler.engine_policy.waiting._line.entries.append((scheduler.calls["c"].key, 99, ghost))


def queue_twice(scheduler: Any) -> None:
    scheduler.engine_policy.waiting._line.entries.append(scheduler.engine_policy.waiting._line.entries[0])


def disorder(scheduler: Any) -> None:
    scheduler.engine_policy.waiting._line.entries.reverse()


def move_a_key(scheduler: Any) -> None:
    call = scheduler.calls["c"]
    call.key = call.key._replace(urgency=Urgency.OVERDUE)


def lose_a_call(scheduler: Any) -> None:
    del scheduler.calls["c"]


def await_nothing(scheduler: Any) -> None:
    scheduler.calls["c"].parked = True


def miscount_colds(scheduler: Any) -> None:
    scheduler.engine_policy.waiting._line.resumes.append(scheduler.engine_policy.waiting._line.entries[-1])


def miscount_prompts(scheduler: Any) -> None:
    scheduler.engine_policy.waiting._line._waited_for += 1


def miscount_tokens(scheduler: Any) -> None:
    scheduler.engine_policy.waiting._line._tokens += 1


def keep_a_call(scheduler: Any) -> None:
    scheduler.engine_policy.programs.table.arrive(call_of("ghost"), "session b", None, 0.0)


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (leak, "is counted as held 1 times, and is held 0 times"),
        (lose_the_holder, "KV blocks are held by the request 'a', which is gone"),
        (lose_the_holder, "'a' runs, and is gone"),
        (hold_twice, "is counted as held 1 times, and is held 2 times"),
        (free_in_use, "is held 1 times, and is 1 times among the free ones"),
        (miscount_free, "free KV blocks and lists"),
        (forget_a_hash, "has the hash of a prefix, and is not in the prefix cache"),
        (run_twice, "a request runs twice"),
        (run_and_wait, "'c' both runs and waits"),
        (remember_a_prefill, "'ghost' has a prefill in steps, and is gone"),
        (forget_to_leave_the_queue, "the queue remembers 'ghost', which is gone"),
        (queue_twice, "a request is in the queue twice"),
        (disorder, "the queue is not in order"),
        (move_a_key, "'c' is not in the queue where its key says"),
        (forget_a_prefill, "'c' is marked as having a prefill in steps, and has none"),
        (lose_a_call, "'c' is not remembered"),
        (await_nothing, "a request is parked that is not marked so, or the other way round"),
        (miscount_colds, "the list of resume prefills is not that of the queue"),
        (miscount_prompts, "prompts that clients wait for, and has"),
        (miscount_tokens, "the queue counts 101 tokens that wait, and has 100"),
        (keep_a_call, "'session b' counts [1, 0, 0, 1, 0] calls by stage, and has [0, 0, 0, 1, 0]"),
    ],
)
def test_every_fault_is_named(plant: Plant, said: str) -> None:
    scheduler = busy()
    plant(scheduler)
    assert any(said in fault for fault in integrity_of(scheduler)), integrity_of(scheduler)


def test_a_call_in_the_queue_that_nobody_remembers_is_named() -> None:
    scheduler = busy()
    lose_a_call(scheduler)
    found = scheduler.engine_policy.waiting.faults(scheduler.calls.values())
    assert "the queue remembers 'c', which is gone" in found


def test_state_that_cannot_be_read_is_a_fault() -> None:
    scheduler = busy()
    scheduler.calls["c"] = object()
    assert any(fault.startswith("the state cannot be read (AttributeError") for fault in integrity_of(scheduler))


def test_jobs_of_the_lane_are_looked_at() -> None:
    scheduler, driver = started()
    scheduler.add_request(make_request("cold", 400))
    driver.step()
    driver.step()
    assert scheduler.integrity.faults() == []
    scheduler._lane.dispatch.in_flight.append(call_of("ghost"))
    assert scheduler.integrity.faults() == ["'ghost' is in the lane, and is gone"]


def test_blocks_that_the_lane_writes_belong_to_nobody_else() -> None:
    scheduler, driver = started()
    scheduler.add_request(make_request("cold", 400))
    driver.step()
    driver.step()
    block = blocks_of(scheduler, "cold")[3]
    block.ref_cnt += 1
    assert f"KV block {block.block_id} is written for 'cold', and is held 2 times" in integrity_of(scheduler)
    block.ref_cnt -= 1
    scheduler.kv_cache_manager.cache_blocks(scheduler.requests["cold"], 400)
    assert f"KV block {block.block_id} is written for 'cold', and is in the prefix cache" in integrity_of(scheduler)
    driver.end("cold")
    driver.until("cold")
    assert integrity_of(scheduler) == []


def test_an_idle_engine_says_what_is_wrong_as_often_as_it_was_asked_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(integrity, "monotonic", lambda: now)
    scheduler: Any = make_scheduler(options={"mode": "time-sliced", "integrity_check_interval_s": 60})
    logger = logging.getLogger("integrity")

    def look() -> int:
        caplog.clear()
        scheduler.integrity.when_idle(scheduler._stats, logger)
        return len(caplog.records)

    assert look() == 0
    leak(scheduler)
    assert look() == 0
    now += 60.0
    assert look() == 2
    assert "state is inconsistent: KV block 1 is counted as held 1 times" in caplog.text
    assert scheduler.counts["integrity_faults"] == 2
    assert look() == 0
    now += 60.0
    scheduler.add_request(make_request("a", 40))
    assert look() == 0
