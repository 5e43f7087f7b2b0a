"""Programs to the digit: threads, standing, how long they are kept, and what is said when their counters do not agree."""

import pytest

from tests.support.program_tables import NamedTable, table
from vllm_agentserve.policy.program import THREADS, Stage


def received(programs: NamedTable, key: str, ms: float, thread: str | None = None) -> None:
    """A call of the program that takes so long, from beginning to end."""
    programs.arrive(f"{key} call", key, None, 0.0, thread)
    programs.charge(f"{key} call", ms)
    programs.finish(f"{key} call", 0.0)


@pytest.mark.parametrize(("policy", "level"), [("plas", 2), ("atlas", 1)])
def test_where_the_next_call_of_a_program_would_wait(policy: str, level: int) -> None:
    """Two threads of 200 ms: 400 ms received on a path of 200."""
    programs = table(policy)
    for call in ("a", "b"):
        programs.arrive(call, "p", 0.0, 0.0)
    for call in ("a", "b"):
        programs.charge(call, 200.0)
        programs.finish(call, 0.0)
    assert programs.next_level(dict(programs.shown(10))["p"]) == level
    programs.arrive("next", "p", None, 0.0)
    assert programs.level("next", 0.0) == level


def test_a_level_holds_twice_the_quantum_of_the_one_before() -> None:
    assert table(levels=4, quantum_ms=100.0).service_bounds_ms() == [100.0, 300.0, 700.0]
    assert [table().level_of(ms) for ms in (-5.0, 0.5, 99.9, 100.0)] == [0, 0, 0, 1]
    assert table(quantum_ms=0.5).level_of(0.4) == 0


def test_charges_add_up() -> None:
    programs = table()
    programs.arrive("one", "p", None, 0.0)
    programs.charge("one", 50.0)
    programs.charge("one", 70.0)
    assert programs.service_ms("one") == 120.0
    assert programs.finish("one", 0.0) == ("p", 120.0)


def test_a_named_thread_goes_on_from_its_own_end() -> None:
    """Whatever the other threads of the program have reached meanwhile."""
    programs = table("atlas")
    received(programs, "p", 150.0, "short")
    programs.arrive("long", "p", 0.0, 0.0, "long")
    programs.charge("long", 500.0)
    programs.finish("long", 0.0)
    for thread, level in (("short", 1), ("long", 2), ("new", 2), (None, 2)):
        programs.arrive("next", "p", None, 0.0, thread)
        assert programs.level("next", 0.0) == level, thread
        programs.finish("next", 0.0)
    programs.arrive("told", "p", 0.0, 0.0, "another")
    assert programs.level("told", 0.0) == 0


def test_named_threads_are_bounded_the_oldest_first() -> None:
    programs = table("atlas")
    for number in range(THREADS):
        programs.arrive("call", "p", 0.0, 0.0, f"t{number}")
        programs.charge("call", 150.0)
        programs.finish("call", 0.0)
    threads = dict(programs.shown(1))["p"].threads
    assert list(threads) == [f"t{number}" for number in range(THREADS)]
    programs.arrive("call", "p", 0.0, 0.0, "t0")
    programs.finish("call", 0.0)
    received(programs, "p", 0.0, "one more")
    assert len(threads) == THREADS
    assert ("t1" in threads, "t0" in threads, threads["t2"]) == (False, True, 150.0)


@pytest.mark.parametrize(("policy", "levels"), [("plas", (3, 3)), ("atlas", (2, 1))])
def test_where_a_running_call_stands(policy: str, levels: tuple[int, int]) -> None:
    """A program of two calls: one has 300 ms of path, 100 of prompt and decodes for 50, the other had a prompt of 150 ms."""
    programs = table(policy, quantum_ms=100.0, levels=8)
    programs.arrive("a", "p", 300.0, 0.0)
    programs.arrive("b", "p", 0.0, 0.0)
    programs.arrive("c", "p", 0.0, 0.0)
    programs.charge("c", 400.0)
    programs.charge("a", 100.0)
    programs.charge("b", 150.0)
    programs.advance(1000.0)
    programs.decodes("a")
    programs.advance(50.0)
    assert (programs.standing("a"), programs.standing("b")) == levels
    assert programs.standing("nobody") == 0


def test_what_a_call_has_decoded_counts_for_where_it_stands() -> None:
    programs = table("atlas")
    programs.arrive("a", "p", 90.0, 0.0)
    programs.charge("a", 5.0)
    assert programs.standing("a") == 0
    programs.decodes("a")
    programs.advance(10.0)
    assert programs.standing("a") == 1
    programs.pauses("a")
    assert programs.standing("a") == 1


def test_who_was_promoted_stands_first() -> None:
    for policy in ("plas", "atlas"):
        programs = table(policy)
        received(programs, "p", 800.0)
        for call in ("a", "b"):
            programs.arrive(call, "p", None, 0.0)
        assert programs.level("a", 1.0) == 3
        assert (programs.level("a", 9.0), programs.standing("a"), programs.standing("b")) == (0, 0, 3)
        assert programs.level("b", 9.0) == 0
        assert programs.promotions == 2


def test_programs_of_no_calls_are_kept_as_long_as_they_may_be() -> None:
    """To the last second of their time, and to the last place."""
    programs = table(ttl_s=60.0, capacity=3)
    for number, key in enumerate("abc"):
        programs.arrive(key, key, None, float(number))
        programs.finish(key, float(number))
    programs.arrive("more", "c", None, 60.0)
    assert [key for key, _ in programs.shown(10)] == ["c", "b", "a"]
    programs.arrive("again", "c", None, 60.5)
    assert [key for key, _ in programs.shown(10)] == ["c", "b"]
    programs.finish("more", 61.0)
    programs.finish("again", 61.0)
    for key in "def":
        programs.arrive(key, key, None, 61.0)
        programs.finish(key, 61.0)
    assert len(programs) <= 4
    assert programs.by_service[0] == len(programs)


def test_a_program_under_way_is_never_the_one_forgotten() -> None:
    programs = table(ttl_s=1.0, capacity=2)
    programs.arrive("live", "live", None, 0.0)
    programs.charge("live", 150.0)
    for number in range(10):
        programs.arrive(f"c{number}", f"p{number}", None, 100.0 + number)
        programs.finish(f"c{number}", 100.0 + number)
    assert programs.service_ms("live") == 150.0
    assert programs.faults(["live"]) == []


def busy() -> NamedTable:
    programs = table()
    for number, call in enumerate("abcd"):
        programs.arrive(call, f"p{number % 2}", None, 0.0)
    programs.prefills("a", False, 100, 0, 100)
    programs.decodes("a")
    programs.advance(10.0, 10.0)
    received(programs, "idle", 250.0)
    return programs


def test_counters_that_agree_have_no_faults() -> None:
    programs = busy()
    assert programs.faults() == []
    programs.pauses("a")
    for call in "abcd":
        programs.finish(call, 1.0)
    assert programs.faults() == []


def test_a_session_that_waits_for_its_client_goes_on_doing_so_when_it_is_queued() -> None:
    """It has lost its KV by then: only such sessions wait in the queue."""
    programs = table()
    programs.arrive("a", "p", None, 0.0)
    programs.prefills("a", False, 100, 0, 100)
    programs.decodes("a")
    call = programs.call("a")
    programs.table.suspends(call, 1.0)
    programs.pauses("a", 2.0)
    assert call.program is not None
    assert call.program.stage is Stage.PAUSED
    assert programs.table.clock.kv_tokens(call.program.program) == 0
    assert programs.faults() == []
    programs.table.continues(call, 3.0)
    assert call.program.stage is Stage.WAITING
    assert programs.faults() == []


def spoil(programs: NamedTable, how: str) -> None:
    """One way in which counts cease to agree."""
    named = dict(programs.shown(10))
    match how:
        case "a call in no stage":
            named["p0"].in_stage[0] -= 1
        case "a decode too many":
            named["p1"].in_stage[3] += 1
        case "a decode nobody looks at":
            programs._decoding.clear()
        case "a decode that is none":
            programs._decoding["p1"] = named["p1"]
        case "decodes in all":
            programs.table.decoding += 1
        case "an idle program with calls":
            programs._idle["p0"] = named["p0"]
        case "an active program without":
            programs._active["idle"] = named["idle"]
        case "a call that waits nowhere":
            named["p1"].waiting.clear()
        case "tokens of nobody":
            named["idle"].kv_tokens = 5
        case "a level":
            named["idle"].service_level = 3
        case "a waiting call":
            programs.waiting[0] += 1


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a call in no stage", ["'p0' counts [0, 0, 0, 1, 0] calls by stage, and has [1, 0, 0, 1, 0]"]),
        ("a decode too many", ["'p1' counts [2, 0, 0, 1, 0] calls by stage, and has [2, 0, 0, 0, 0]"]),
        ("a decode nobody looks at", ["'p0' is not where programs with 1 decoding calls are"]),
        ("a decode that is none", ["'p1' is not where programs with 0 decoding calls are"]),
        ("decodes in all", ["2 calls are counted as decoding"]),
        ("an idle program with calls", ["'p0' is not where programs with 2 calls are"]),
        ("an active program without", ["'idle' is not where programs with 0 calls are"]),
        ("a call that waits nowhere", ["'p1' lists other waiting calls than it has"]),
        ("tokens of nobody", ["'idle' has no calls, and holds 5 tokens"]),
        ("a level", ["programs are not at the levels that are counted"]),
        ("a waiting call", ["calls do not wait at the levels that are counted"]),
    ],
)
def test_counts_that_do_not_agree_say_where(how: str, said: list[str]) -> None:
    programs = busy()
    spoil(programs, how)
    assert programs.faults()[: len(said)] == said


def test_calls_that_nobody_knows_are_said() -> None:
    programs = busy()
    del programs.calls["d"]
    assert "'p1' counts [2, 0, 0, 0, 0] calls by stage, and has [1, 0, 0, 0, 0]" in programs.faults()


def test_two_calls_that_stop_decoding_one_after_the_other() -> None:
    programs = table()
    for call in "abc":
        programs.arrive(call, "p", None, 0.0)
    programs.advance(100.0)
    programs.decodes("a")
    programs.advance(10.0)
    programs.decodes("b")
    programs.advance(20.0)
    programs.pauses("a")
    assert programs.service_ms("c") == 50.0
    programs.advance(5.0)
    assert programs.service_ms("c") == 55.0
    programs.pauses("b")
    assert programs.service_ms("c") == 55.0


@pytest.mark.parametrize(("policy", "waiting"), [("plas", [0, 0, 0, 1]), ("atlas", [0, 1, 0, 0])])
def test_a_call_is_counted_at_its_level_from_the_start(policy: str, waiting: list[int]) -> None:
    programs = table(policy)
    received(programs, "p", 800.0)
    programs.arrive("call", "p", 150.0, 0.0)
    assert programs.waiting == waiting
