"""AgentScheduler on vLLM's real scheduler classes, without a model: literal rows of who runs with how many tokens.

The controller is pinned: chunks cost 0.1 ms per token, a step without prefill costs nothing, and the target is 10 ms. So a
step beside decodes has room for 100 prompt tokens, unless a row says otherwise.
"""

from typing import Any

import pytest
from schedulers import BLOCK, Driver, make_request, make_scheduler
from test_policy_budget import FlatModel
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, PriorityRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_agentserve import AgentScheduler
from vllm_agentserve.policy.controller import BudgetController
from vllm_agentserve.policy.order import AdmissionKey, Urgency
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.scheduler.queues import AgentQueue
from vllm_agentserve.scheduler.scheduler import AsyncAgentScheduler

COLD, RESUME, DECODE = Phase.COLD_PREFILL, Phase.RESUME_PREFILL, Phase.DECODE


class PinnedModel(FlatModel):
    """FlatModel that does not learn."""

    def decode_ms(self, sequences: int, context: int) -> float:
        return 0.0

    def learn_decode(self, *_: Any) -> None:
        pass

    def learn_prefill(self, *_: Any) -> float:
        return 0.0


class PinnedController(BudgetController):
    """A controller whose clock stands still: every step takes exactly nothing."""

    def observe(self, *_: Any, **__: Any) -> None:
        pass


def pinned(asynchronous: bool = False, options: dict[str, Any] | None = None, **given: Any) -> tuple[Any, Driver]:
    given = {
        "options": {"tpot_slo_ms": 10, "first_chunk_tokens": 4096, "chunk_granularity_tokens": 1, **(options or {})}
    } | given
    scheduler = make_scheduler(asynchronous=asynchronous, **given)
    controller = PinnedController(scheduler._controller.limits)
    controller.whole.model = PinnedModel()
    scheduler._controller = scheduler._log._controller = scheduler._stats._controller = controller
    return scheduler, Driver(scheduler, depth=2 if asynchronous else 1)


def phases(scheduler: Any) -> dict[str, Phase]:
    """What every running sequence is tagged before the next step."""
    tags = {request.request_id: DECODE for request in scheduler.running}
    return tags | {name: prefill.phase for name, prefill in scheduler._prefills.items()}


def context_of(request: Request) -> list[int]:
    return list(request.all_token_ids)


def finish(scheduler: Any, driver: Driver, name: str) -> None:
    """Steps until a request is through."""
    for _ in range(500):
        if name not in scheduler.requests:
            return
        driver.step()
    raise AssertionError(f"{name} did not finish")


@pytest.mark.parametrize(("asynchronous", "base"), [(False, Scheduler), (True, AsyncScheduler)])
def test_one_name_is_synchronous_or_asynchronous_as_vllm_is(asynchronous: bool, base: type) -> None:
    scheduler = make_scheduler(asynchronous=asynchronous)
    assert isinstance(scheduler, AgentScheduler)
    assert isinstance(scheduler, AsyncScheduler) is asynchronous
    assert base in type(scheduler).__mro__
    assert type(scheduler) is (AsyncAgentScheduler if asynchronous else AgentScheduler)


# arrivals: {step: [(name, prompt tokens)]}; rows: what runs in each step, in tokens.
COLD_BESIDE_DECODE = (
    {0: [("a", 50)], 1: [("big", 250)]},
    [
        {"a": 50},  # alone: the whole prompt
        {"a": 1, "big": 95},  # 1 decode + 95 = 96 tokens, a step size
        {"a": 1, "big": 95},
        {"a": 1, "big": 60},  # the rest
        {"a": 1, "big": 1},
    ],
)
COLD_ALONE = (
    {0: [("big", 5000)]},
    [{"big": 2048}, {"big": 2048}, {"big": 904}, {"big": 1}],
)
TWO_COLD_IN_ORDER = (
    {0: [("a", 50)], 1: [("x", 150), ("y", 120)]},
    [
        {"a": 50},
        {"a": 1, "x": 95},
        {"a": 1, "x": 55, "y": 40},  # what x leaves goes to y: 1 + 55 + 40 = 96
        {"a": 1, "x": 1, "y": 80},  # y ends: not rounded
        {"a": 1, "x": 1, "y": 1},
    ],
)
NEVER_ZERO = (
    {0: [(f"d{n}", 10) for n in range(4)], 1: [("big", 40)]},
    [
        {f"d{n}": 10 for n in range(4)},
        {**{f"d{n}": 1 for n in range(4)}, "big": 16},
        {**{f"d{n}": 1 for n in range(4)}, "big": 16},
        {**{f"d{n}": 1 for n in range(4)}, "big": 8},
    ],
)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (COLD_BESIDE_DECODE, {}),
        (COLD_ALONE, {}),
        (TWO_COLD_IN_ORDER, {}),
        (NEVER_ZERO, {"tpot_slo_ms": 1}),  # room for 10 tokens: the floor of 16 holds
    ],
    ids=["cold beside decode", "cold alone", "two cold in order", "never zero"],
)
def test_steps(case: tuple[dict, list[dict[str, int]]], options: dict[str, Any]) -> None:
    arrivals, rows = case
    scheduler, driver = pinned(options=options)
    for step, row in enumerate(rows):
        for name, prompt in arrivals.get(step, []):
            scheduler.add_request(make_request(name, prompt))
        assert driver.step() == row, f"step {step}"


def test_asynchronous_steps() -> None:
    """The step after a prompt's last chunk already decodes it, before its first token is back."""
    scheduler, driver = pinned(asynchronous=True)
    scheduler.add_request(make_request("a", 50))
    rows = [driver.step()]
    scheduler.add_request(make_request("big", 250))
    rows += [driver.step() for _ in range(5)]
    assert rows == [
        {"a": 50},
        {"a": 1, "big": 95},
        {"a": 1, "big": 95},
        {"a": 1, "big": 60},
        {"a": 1, "big": 1},
        {"a": 1, "big": 1},
    ]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_phases_follow_what_the_cache_holds(asynchronous: bool) -> None:
    scheduler, driver = pinned(asynchronous)
    scheduler.add_request(make_request("other", 50))
    scheduler.add_request(make_request("agent", 25 * BLOCK, max_tokens=2, session="s"))
    driver.step()
    assert phases(scheduler) == {"other": DECODE, "agent": DECODE}  # nobody decoded: one step took both prompts
    context = context_of(scheduler.requests["agent"])
    finish(scheduler, driver, "agent")
    driver.step()

    scheduler.add_request(make_request("turn-2", context + list(range(150)), max_tokens=2, session="s"))
    driver.step()
    assert phases(scheduler)["turn-2"] is RESUME
    scheduler.add_request(make_request("new", 600))
    driver.step()
    assert phases(scheduler)["new"] is COLD
    counts = scheduler._stats.counts
    assert (counts["cold_prefill_requests"], counts["resume_prefill_requests"]) == (3, 1)


def test_a_preempted_sequence_is_tagged_anew() -> None:
    scheduler, driver = pinned(num_blocks=41, prefix_caching=True)
    scheduler.add_request(make_request("a", 20 * BLOCK - 2))
    driver.step()
    scheduler.add_request(make_request("b", 20 * BLOCK - 20))
    while scheduler.requests["b"].num_preemptions == 0:
        driver.step()
    assert scheduler.requests["b"].status == RequestStatus.PREEMPTED
    assert phases(scheduler) == {"a": DECODE}
    assert next(iter(scheduler.waiting)).request_id == "b"
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    before = dict(scheduler._stats.counts)
    driver.step()
    tagged = [
        name
        for name in ("cold_prefill_requests", "resume_prefill_requests")
        if scheduler._stats.counts[name] > before[name]
    ]
    assert tagged == ["resume_prefill_requests"]  # its blocks were still cached


def waiting(scheduler: Any) -> list[str]:
    return [request.request_id for request in scheduler.waiting]


def with_cached_contexts(scheduler: Any, driver: Driver, *lengths: int) -> list[list[int]]:
    """Runs prompts of these lengths through, so that their blocks are cached, and returns them."""
    contexts = []
    for number, length in enumerate(lengths):
        request = make_request(f"warm-{number}", length, max_tokens=1)
        contexts.append(context_of(request))
        scheduler.add_request(request)
        finish(scheduler, driver, request.request_id)
    return contexts


def test_resume_prefills_come_before_cold_ones_and_the_shortest_first() -> None:
    scheduler, driver = pinned()
    first, second, third = with_cached_contexts(scheduler, driver, 320, 320, 320)
    scheduler.add_request(make_request("decoding", 10))
    driver.step()
    scheduler.add_request(make_request("cold", 500))
    scheduler.add_request(make_request("long resume", first + list(range(300))))
    scheduler.add_request(make_request("resume 60", second + list(range(60))))
    scheduler.add_request(make_request("resume 20", third + list(range(20))))
    assert waiting(scheduler) == ["resume 20", "resume 60", "cold", "long resume"]
    assert driver.step() == {"decoding": 1, "resume 20": 20, "resume 60": 60, "cold": 16}
    assert driver.step() == {"decoding": 1, "resume 20": 1, "resume 60": 1, "cold": 93}


def test_a_running_cold_prefill_makes_room_for_a_waiting_resume() -> None:
    scheduler, driver = pinned()
    (context,) = with_cached_contexts(scheduler, driver, 320)
    scheduler.add_request(make_request("decoding", 10))
    driver.step()
    scheduler.add_request(make_request("cold", 500))
    assert driver.step() == {"decoding": 1, "cold": 95}
    scheduler.add_request(make_request("resume", context + list(range(40))))
    row = driver.step()
    assert row["resume"] == 40
    assert 16 <= row["cold"] <= 60


def test_nobody_is_overtaken_for_longer_than_the_bound() -> None:
    """Short resume prefills keep coming; a cold prompt still starts within max_bypass_steps, and then never stands still."""
    scheduler, driver = pinned(options={"max_bypass_steps": 10, "resume_budget_max_tokens": 64}, max_num_seqs=256)
    contexts = with_cached_contexts(scheduler, driver, *[320] * 8)
    scheduler.add_request(make_request("decoding", 10))
    driver.step()
    scheduler.add_request(make_request("cold", 400))
    started = None
    chunks = []
    for step in range(60):
        for n in range(4):
            scheduler.add_request(make_request(f"resume-{step}-{n}", contexts[n] + [step] * 40, max_tokens=1))
        chunks.append(driver.step().get("cold", 0))
        if chunks[-1] and started is None:
            started = step
    assert started is not None
    assert started <= 11
    through = chunks[started : started + 25]
    assert sum(through) >= 400
    assert all(chunk >= 16 for chunk in through[: through.index(1)][:-1])


def test_cold_prompts_keep_their_order_of_arrival() -> None:
    scheduler, driver = pinned(max_num_seqs=2)
    for name in ("a", "b", "c", "d"):
        scheduler.add_request(make_request(name, 100, max_tokens=3))
    began: list[str] = []
    while scheduler.requests:
        began += [name for name in driver.step() if name not in began]
    assert began == ["a", "b", "c", "d"]


def test_a_shared_prompt_is_cold_once() -> None:
    """The second of two agents with the same system prompt is tagged again when the first has filled the cache."""
    scheduler, driver = pinned()
    system = context_of(make_request("system", 40 * BLOCK))
    scheduler.add_request(make_request("decoding", 10))
    driver.step()
    scheduler.add_request(make_request("first", system + [1] * 20))
    scheduler.add_request(make_request("second", system + [2] * 20))
    while "second" not in phases(scheduler):
        driver.step()
    assert scheduler._stats.counts["cold_prefill_requests"] == 2  # decoding and first
    assert scheduler._stats.counts["resume_prefill_requests"] == 1


def test_abort_in_every_state_leaves_nothing_behind() -> None:
    scheduler, driver = pinned(max_num_seqs=2)
    for name in ("decoding", "prefilling", "waiting"):
        scheduler.add_request(make_request(name, 400 if name != "decoding" else 10))
        driver.step()
    assert phases(scheduler) == {"decoding": DECODE, "prefilling": COLD}
    scheduler.finish_requests(["decoding", "prefilling", "waiting"], RequestStatus.FINISHED_ABORTED)
    driver.step()
    assert not scheduler.requests
    assert not scheduler.waiting
    assert not scheduler._prefills
    assert not scheduler._queue._places
    assert scheduler.kv_cache_manager.usage == 0.0


def test_priority_policy_stays_in_force() -> None:
    scheduler, driver = pinned(policy="priority")
    assert isinstance(scheduler.waiting, PriorityRequestQueue)
    scheduler.add_request(make_request("decoding", 10))
    driver.step()
    scheduler.add_request(make_request("later", 300, priority=1))
    scheduler.add_request(make_request("first", 300, priority=0))
    row = driver.step()
    assert (row["decoding"], row["first"], "later" in row) == (1, 95, False)


def test_stock_mode_is_stock() -> None:
    ours, stock = (make_scheduler(cls, options={"mode": "stock"}) for cls in (True, False))
    assert isinstance(ours.waiting, FCFSRequestQueue)
    drivers = [Driver(ours), Driver(stock)]
    for step in range(12):
        for driver in drivers:
            if step % 3 == 0:
                driver.scheduler.add_request(make_request(f"r{step}", [step] * 3000, max_tokens=5))
        assert drivers[0].step() == drivers[1].step()


def test_without_chunked_prefill_nothing_is_cut() -> None:
    scheduler, driver = pinned(max_num_batched_tokens=16384)
    scheduler.scheduler_config.enable_chunked_prefill = False
    scheduler._cuts_prefills = False  # decided at start from the same setting, see test_obstacles
    scheduler.add_request(make_request("decoding", 10))
    driver.step()
    scheduler.add_request(make_request("big", 3000))
    assert driver.step() == {"decoding": 1, "big": 3000}


def test_a_user_threshold_of_vllm_stays_in_force() -> None:
    scheduler, driver = pinned(options={"tpot_slo_ms": 1000}, long_prefill_token_threshold=64)
    scheduler.add_request(make_request("decoding", 10))
    driver.step()
    scheduler.add_request(make_request("big", 300))
    assert driver.step() == {"decoding": 1, "big": 64}


def test_queue_answers_like_a_queue() -> None:
    queue = AgentQueue(lambda request, number: AdmissionKey(Urgency.NORMAL, cold=True, arrival=number), patience=5)
    first, second = make_request("first", 10), make_request("second", 10)
    with pytest.raises(IndexError):
        queue.peek_request()
    for request in (first, second):
        queue.add_request(request)
    assert [request.request_id for request in queue] == ["first", "second"]
    assert (queue.pop_request(), len(queue), first in queue, second in queue) == (first, 1, False, True)
    queue.prepend_requests([first])
    assert queue[0] is first
    queue.remove_requests([first, make_request("stranger", 3)])
    with pytest.raises(ValueError, match="'first' is not in the queue"):
        queue.remove_request(first)
    queue.forget("second")
    assert not queue


def test_parked_requests_wait_unseen() -> None:
    queue = AgentQueue(lambda request, number: AdmissionKey(Urgency.NORMAL, cold=True, arrival=number), patience=5)
    requests = {name: make_request(name, 10) for name in "abcdef"}
    for request in requests.values():
        queue.add_request(request)
    queue.park({"a": None, "c": None, "d": "block 1", "e": "block 2", "stranger": None})
    assert (len(queue), queue.parked, bool(queue), queue.peek_request().request_id) == (6, 4, True, "b")
    assert [request.request_id for request in queue] == ["b", "f", "a", "c", "d", "e"]
    queue.release(0, {"block 1", "block 2"})
    assert queue.parked == 4
    queue.release(1, {"block 2"})
    assert [queue[index].request_id for index in range(4)] == ["a", "b", "d", "f"]
    queue.remove_requests([requests["c"], requests["b"]])
    assert (len(queue), requests["c"] in queue) == (4, False)
    for name in "adf":
        queue.remove_request(requests[name])
    assert (bool(queue), len(queue)) == (False, 1)
    queue.release(None, {"block 2"})
    assert not queue
    queue.release(None, set())
    assert queue.pop_request() is requests["e"]
    queue.park({"e": None})
    assert (len(queue), queue.parked) == (0, 0)


def test_a_parked_request_that_is_overdue_is_first_when_it_is_back() -> None:
    queue = AgentQueue(lambda request, number: AdmissionKey(Urgency.NORMAL, cold=True, arrival=number), patience=5)
    for name in ("early", "late"):
        queue.add_request(make_request(name, 10))
    queue.park({"late": None})
    queue.step = 5
    assert queue.promote_overdue() == 1
    queue.release(None, set())
    assert [request.request_id for request in queue] == ["early", "late"]
    assert all(key.urgency == Urgency.OVERDUE for key, _, _ in queue._order)


def test_a_seeded_prompt_is_not_cut_on_cpu() -> None:
    """vLLM's CPU runner ends the engine when it samples with a seed after a chunk."""
    scheduler, driver = pinned()
    scheduler.vllm_config.device_config.device_type = "cpu"
    scheduler.add_request(make_request("decoding", 10))
    driver.step()
    seeded = make_request("seeded", 700)
    seeded.sampling_params.seed = 7
    scheduler.add_request(seeded)
    scheduler.add_request(make_request("plain", 700))
    assert driver.step() == {"decoding": 1, "seeded": 700}
