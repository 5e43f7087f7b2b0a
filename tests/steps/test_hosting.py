"""Host memory that is too small, by programs, on vLLM's real scheduler and connector: who finds its context, and that it is what
was computed."""

import random
from typing import Any

import pytest
from vllm.v1.kv_offload.base import OffloadKey, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.request import RequestStatus

from tests.support.host_calls import ask, finished, random_calls, started
from vllm_agentserve.scheduler.features.hosting import HostPrograms
from vllm_agentserve.vllm_compat.program_cache import ProgramCachePolicy, unknown

ROUNDS, PROGRAMS, TOKENS, ADDED = 5, "abcdefgh", 200, 32
"""Contexts of 2,700 tokens at their ends; a KV cache of 1,024, and a host of half of what is live."""


def feature(scheduler: Any) -> HostPrograms:
    (found,) = [one for one in scheduler._events.features if isinstance(one, HostPrograms)]
    return found


def in_turns(kv_host_policy: str, chunks: int) -> tuple[float, Any]:
    """Programs come back in turns; the share of their contexts that they find, after two rounds in which the host learns."""
    scheduler, driver = started(chunks=chunks, kv_host_policy=kv_host_policy)
    found = sought = 0
    for number in range(ROUNDS):
        for name in PROGRAMS:
            request = ask(scheduler, name, TOKENS + ADDED * number, number=number)
            call = scheduler.calls[request.request_id]
            finished(scheduler, driver)
            if number > 1:
                found += call.cached_tokens or 0
                sought += TOKENS + ADDED * (number - 1)
    driver.close()
    return found / sought, scheduler


def test_programs_that_come_back_in_turns_find_what_longest_unused_first_loses() -> None:
    chunks = len(PROGRAMS) * (TOKENS + ADDED * ROUNDS) // 16 // 2
    lru, _ = in_turns("lru", chunks)
    arc, _ = in_turns("arc", chunks)
    ours, scheduler = in_turns("program", chunks)
    assert ours >= max(lru, arc) + 0.05
    assert ours > 0.3
    assert type(scheduler.host.eviction) is ProgramCachePolicy
    assert scheduler.host.used_tokens <= scheduler.host.tokens == chunks * 16


def test_a_program_whose_last_call_was_said_makes_room_first() -> None:
    scheduler, driver = started(chunks=40, kv_host_policy="program")
    for number in range(3):
        for name in "ab":
            ask(scheduler, name, 200 + 16 * number, number=number)
            finished(scheduler, driver)
    ask(scheduler, "a", 260, number=9, agent_last=True)
    finished(scheduler, driver)
    ask(scheduler, "c", 300)
    finished(scheduler, driver)
    hosting = feature(scheduler).copies.hosting
    sizes = {name: len(context) for name, context in hosting._contexts.items()}
    assert sizes.get("session a", 0) < sizes["session b"]
    driver.close()


def test_what_is_known_of_requests_goes_with_them() -> None:
    scheduler, driver = started(chunks=64, kv_host_policy="program")
    for name in "abc":
        ask(scheduler, name, 100)
    driver.step()
    copies = feature(scheduler).copies
    assert copies.names == {f"{name}-0": f"session {name}" for name in "abc"}
    scheduler.finish_requests("b-0", RequestStatus.FINISHED_ABORTED)
    finished(scheduler, driver)
    ask(scheduler, "d", 100)
    finished(scheduler, driver)
    assert copies.names.keys() <= {"d-0"}
    assert not feature(scheduler)._waiting
    scheduler.reset_prefix_cache()
    assert scheduler.host.used_tokens == len(copies.hosting) == 0
    driver.close()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("chunks", [24, 60], ids=["smaller than a context", "smaller than what is live"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_whatever_happens_nobody_reads_another_context(seed: int, chunks: int, asynchronous: bool) -> None:
    """Calls of many programs with and without names, aborts, preemptions, resets, and copies that are late."""
    rng = random.Random(seed)
    scheduler, driver = started(
        num_blocks=49,
        chunks=chunks,
        holds=True,
        max_num_seqs=5,
        kv_host_policy="program",
        kv_retain=seed > 0,
        tpot_slo_ms=50.0,
        asynchronous=asynchronous,
    )
    random_calls(scheduler, driver, rng, ends=0.1)
    driver.close()


def test_who_lost_its_place_is_expected_until_it_runs_again() -> None:
    """Two answers grow until the KV cache is too small for both."""
    scheduler, driver = started(num_blocks=33, kv_host_policy="program")
    for name in "ab":
        ask(scheduler, name, 200, max_tokens=200)
    hosting = feature(scheduler).copies.hosting
    for _ in range(300):
        driver.step()
        waiting = [one for one in scheduler.requests.values() if one.status is RequestStatus.PREEMPTED]
        if waiting:
            break
    (lost,) = waiting
    name = f"session {lost.request_id[0]}"
    assert len(hosting.context(name)) > 12
    assert name not in hosting._first
    assert [*hosting._order(None)][-1] == name
    finished(scheduler, driver)
    assert [program.waiting for program in hosting._programs.values()] == [0, 0]
    driver.close()


def test_who_lost_its_place_and_is_aborted_does_not_wait() -> None:
    scheduler, driver = started(num_blocks=33, kv_host_policy="program")
    for name in "ab":
        ask(scheduler, name, 200, max_tokens=200)
    for _ in range(300):
        driver.step()
        waiting = [one for one in scheduler.requests.values() if one.status is RequestStatus.PREEMPTED]
        if waiting:
            break
    scheduler.finish_requests(waiting[0].request_id, RequestStatus.FINISHED_ABORTED)
    finished(scheduler, driver)
    programs = feature(scheduler).copies.hosting._programs.values()
    assert [(program.waiting, program.calls) for program in programs] == [(0, 0)] * 2
    driver.close()


def chunks_of(name: str, numbers: range) -> list[OffloadKey]:
    return [make_offload_key(f"{name}{number}".encode(), 0) for number in numbers]


def test_blocks_that_are_offered_once_more_are_those_of_their_program() -> None:
    """vLLM says once that a request misses them."""
    manager = CPUOffloadingManager(4, "ProgramCachePolicy", "vllm_agentserve.vllm_compat.program_cache")
    policy: Any = manager._policy
    requests = {name: ReqContext(name) for name in "abc"}
    for name, request in requests.items():
        policy.names[name] = f"program {name}"
        for end, key in enumerate(chunks_of(name, range(4)), 1):
            request.set_offload_key_position(key, 16 * end)

    def store(name: str, *numbers: int) -> bool:
        output = manager.prepare_store([chunks_of(name, range(4))[number] for number in numbers], requests[name])
        if output is not None:
            manager.complete_store(output.keys_to_store, requests[name])
        return output is not None

    # While all room is being written to, there is none.
    under_way = manager.prepare_store(chunks_of("a", range(4)), requests["a"])
    assert under_way is not None
    assert not store("b", 0, 1)
    manager.complete_store(under_way.keys_to_store, requests["a"])
    assert store("c", 0)
    assert store("b", 0, 1)
    assert {*policy.hosting.context("program b")} == {*chunks_of("b", range(2))}
    # A call that lost its place stores again what made room meanwhile.
    assert store("b", 2, 3)
    assert store("c", 1, 2, 3)
    assert store("b", 0, 1, 2, 3)
    assert {*policy.hosting.context("program b")} == {*chunks_of("b", range(4))}
    assert policy.faults() == []
    for request in requests.values():
        manager.on_request_finished(request)
    assert not policy._storing


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ("", "abcdef"),
        ("abcd", "ef"),
        ("abcdef", ""),
        # Something in the middle made room, or a call beside this one has another end.
        ("abde", "cf"),
        ("abcdx", "ef"),
        ("axy", "bcdef"),
        # As much is gone as another end has: the gap is not seen, and makes room sooner.
        ("abdx", "ef"),
    ],
)
def test_what_is_new_of_a_context(known: str, expected: str) -> None:
    assert [*unknown([*"abcdef"], {*known})] == [*expected]  # type: ignore[list-item]
