"""AgentScheduler on vLLM's real scheduler classes, without a model: literal rows of who runs with how many tokens.

The controller is pinned: chunks cost 0.1 ms per token, a step without prefill costs nothing, and the target is 10 ms. So a
step beside decodes has room for 100 prompt tokens, unless a row says otherwise.
"""

from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from tests.support.pinned import context_of, finish, phases, pinned
from tests.support.schedulers import BLOCK, make_request, make_scheduler
from vllm_agentserve import AgentScheduler
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.scheduler.scheduler import AsyncAgentScheduler

COLD, RESUME, DECODE = Phase.COLD_PREFILL, Phase.RESUME_PREFILL, Phase.DECODE


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
    counts = scheduler.counts
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
    before = dict(scheduler.counts)
    driver.step()
    tagged = [
        name for name in ("cold_prefill_requests", "resume_prefill_requests") if scheduler.counts[name] > before[name]
    ]
    assert tagged == ["resume_prefill_requests"]  # its blocks were still cached


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
    assert not scheduler.engine_policy.prefilling
    assert not scheduler.calls
    assert scheduler.kv_cache_manager.usage == 0.0


def test_without_chunked_prefill_nothing_is_cut() -> None:
    scheduler, driver = pinned(max_num_batched_tokens=16384)
    scheduler.scheduler_config.enable_chunked_prefill = False
    scheduler.engine_policy.cuts = False  # decided at start from the same setting, see test_obstacles
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
