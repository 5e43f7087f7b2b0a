"""What AgentScheduler adds to a schedule() + update_from_output() pair of vLLM's own scheduler, without a model.

    make bench-cost

Stock and ours alternate step by step in one process, so that both see the same machine; the figure is the ratio of the
medians. pytest-benchmark prints each arm's own distribution.
"""

import statistics
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from time import monotonic, perf_counter, thread_time
from typing import Any

import pytest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.kv_offload.base import ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output.request import StructuredOutputRequest

from tests.support.calls import call_of
from tests.support.schedulers import Driver, make_request, make_scheduler
from vllm_agentserve.vllm_compat.host import OWN_POLICIES

STEPS = 3000
PROGRAMS = 10_000


def steady(ours: bool, running: int, asynchronous: bool, waiting: int = 0, places: int = 8, **options: Any) -> Driver:
    """An engine with that many decodes, that many requests that wait for a place, and nothing else."""
    scheduler = make_scheduler(
        ours, asynchronous, options, max_num_seqs=max(running, places), max_num_batched_tokens=8192, num_blocks=200_000
    )
    for number in range(running + waiting):
        scheduler.add_request(make_request(f"r{number}", 64, max_tokens=16_000, session=f"s{number}"))
    driver = Driver(scheduler, depth=2 if asynchronous else 1)
    while any(request.num_output_tokens < 8 for request in scheduler.running) or not scheduler.running:
        driver.step()
    return driver


def remember(scheduler: Any, programs: int) -> None:
    """Lets as many programs come and end, each with one call."""
    table = scheduler.engine_policy.programs.table
    for number in range(programs):
        call = call_of(f"old-{number}")
        table.arrive(call, f"session old-{number}", None, monotonic())
        table.finish(call, monotonic())


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("running", [8, 64, 256])
def test_added_cost(running: int, asynchronous: bool, record_property) -> None:
    arms = {"stock": steady(False, running, asynchronous), "ours": steady(True, running, asynchronous)}
    for driver in arms.values():
        driver.took.clear()
    for step in range(STEPS):
        for name in ("stock", "ours") if step % 2 else ("ours", "stock"):
            arms[name].step()
    stock, ours = (statistics.median(arms[name].took) * 1e6 for name in ("stock", "ours"))
    print(
        f"\n{running:4d} running, {'async' if asynchronous else 'sync'}: stock {stock:7.1f} us, ours {ours:7.1f} us, "
        f"added {ours - stock:5.1f} us = {(ours / stock - 1) * 100:+.1f} %"
    )
    record_property("added_percent", (ours / stock - 1) * 100)


@pytest.mark.parametrize("waiting", [0, PROGRAMS - 64], ids=["remembered", "waiting"])
def test_cost_of_programs(waiting: int, record_property) -> None:
    """10,000 live programs, 64 of them running: the others are remembered, or wait with a call each."""
    arms = {
        "fcfs": steady(True, 64, False, waiting, max_bypass_steps=1_000_000),
        "plas": steady(True, 64, False, waiting, max_bypass_steps=1_000_000, policy="plas"),
    }
    if not waiting:
        remember(arms["plas"].scheduler, PROGRAMS - 64)
    for driver in arms.values():
        driver.took.clear()
    for step in range(STEPS):
        for name in ("fcfs", "plas") if step % 2 else ("plas", "fcfs"):
            arms[name].step()
    median = {name: statistics.median(driver.took) * 1e6 for name, driver in arms.items()}
    mean = {name: statistics.fmean(driver.took) * 1e6 for name, driver in arms.items()}
    print(
        f"\n{PROGRAMS} programs, 64 running, {waiting} waiting: fcfs {median['fcfs']:.1f} us, plas {median['plas']:.1f} us, "
        f"added {median['plas'] - median['fcfs']:.1f} us; mean added {mean['plas'] - mean['fcfs']:.1f} us"
    )
    record_property("added_us", median["plas"] - median["fcfs"])


@pytest.mark.parametrize("waiting", [0, 2000])
def test_cost_of_requests_that_wait_for_grammars(waiting: int, record_property) -> None:
    """Eight requests decode, the others wait until another thread has made their grammar."""
    took = {}
    for ours in (False, True):
        driver = steady(ours, 8, asynchronous=False, places=16)
        for number in range(waiting):
            request = make_request(f"waits {number}", 600)
            request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
            parameters = StructuredOutputsParams(json_object=True)
            request.structured_output_request = StructuredOutputRequest(parameters, Future())
            driver.scheduler.add_request(request)
        for _ in range(5):
            driver.step()
        driver.took.clear()
        began = thread_time()
        for _ in range(100):
            driver.step()
        took[ours] = (thread_time() - began) * 10
    print(f"\n{waiting} requests wait for grammars: stock {took[False]:.2f} ms a step, ours {took[True]:.2f} ms")
    record_property("ms", took[True])


def host_with(policy: str, programs: int, blocks: int) -> tuple[list[float], Callable[[], None]]:
    """vLLM's manager of host memory that keeps the contexts of so many programs: what its policy takes for the ends of calls, in
    seconds, and one more call of one of them, which has a block that is new."""
    name, module = OWN_POLICIES.get(policy, (policy, None))
    manager: Any = CPUOffloadingManager(programs * (blocks + 64), name, module)
    contexts = {
        program: [make_offload_key(f"{program} {block}".encode(), 0) for block in range(blocks)]
        for program in range(programs)
    }
    numbers = count()

    def call(program: int, new: int) -> ReqContext:
        request = ReqContext(f"call {next(numbers)}")
        if policy in OWN_POLICIES:
            manager._policy.names[request.req_id] = f"program {program}"
        for end, key in enumerate(contexts[program], 1):
            request.set_offload_key_position(key, 16 * end)
        if before := contexts[program][:-new]:
            # Its context comes back whole.
            manager.prepare_load(before, request)
            manager.complete_load(before, request)
        stored = manager.prepare_store(contexts[program][-new:], request)
        manager.complete_store(stored.keys_to_store, request)
        return request

    for program in range(programs):
        manager.on_request_finished(call(program, blocks))
    took: list[float] = []
    finished = manager._policy.on_request_finished

    def timed(*given: Any) -> None:
        began = perf_counter()
        finished(*given)
        took.append(perf_counter() - began)

    manager._policy.on_request_finished = timed

    def one_more() -> None:
        contexts[0].append(make_offload_key(f"more {len(contexts[0])}".encode(), 0))
        manager.on_request_finished(call(0, 1))

    return took, one_more


def test_cost_of_the_end_of_a_call_where_there_is_host_memory(record_property) -> None:
    """Sixty programs of 8,900 blocks; the context of the call came back from there. Not what vLLM does around its policy."""
    for policy in ("program", "lru"):
        took, one_more = host_with(policy, 60, 8_900)
        for _ in range(41):
            one_more()
        ms = statistics.median(took) * 1e3
        print(f"\n{policy}: {ms:.3f} ms")
        record_property(policy, ms)


@pytest.mark.parametrize("blocks", [1_000, 10_000, 100_000])
def test_cost_of_a_look_at_the_books(blocks: int, record_property) -> None:
    """What `integrity_check_interval_s` costs an idle engine each time: with ten thousand programs remembered, and with none."""
    took = {}
    for programs in (0, PROGRAMS):
        scheduler: Any = make_scheduler(True, False, {"policy": "plas"}, num_blocks=blocks)
        remember(scheduler, programs)
        times = []
        for _ in range(20):
            began = perf_counter()
            assert scheduler.integrity.faults() == []
            times.append(perf_counter() - began)
        took[programs] = statistics.median(times) * 1e3
    print(f"\n{blocks} KV blocks: {took[0]:.2f} ms, with {PROGRAMS} programs {took[PROGRAMS]:.2f} ms")
    record_property("ms", took[0])


@pytest.mark.parametrize("running", [8, 64, 256])
@pytest.mark.parametrize("arm", ["stock", "ours"])
def test_step(benchmark, arm: str, running: int) -> None:
    driver = steady(arm == "ours", running, asynchronous=False)
    benchmark.pedantic(driver.step, rounds=1000, warmup_rounds=100)
