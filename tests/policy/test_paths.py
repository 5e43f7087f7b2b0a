"""The longest path to a call, for `atlas`: what leads to a call that waited for others."""

from tests.support.program_tables import table
from vllm_agentserve.policy.program import ENDS
from vllm_agentserve.policy.programs import ProgramTable


def fan_in(programs: ProgramTable, rounds: int, prompt_ms: float = 300.0) -> float:
    """Rounds of five attempts of 1000 ms and a judge, which goes on from the call before the attempts; returns its path."""
    programs.arrive("first", "p", 0.0, 0.0)
    programs.charge("first", prompt_ms)
    _, path = programs.finish("first", 0.0) or ("", 0.0)
    for _ in range(rounds):
        end = programs.ended
        for attempt in "abcde":
            programs.arrive(attempt, "p", path, 0.0, end=end)
            programs.charge(attempt, 1000.0)
        for attempt in "abcde":
            assert programs.calls[attempt].program.path_ms == path
            programs.finish(attempt, 0.0)
        programs.arrive("judge", "p", path, 0.0, end=end)
        programs.charge("judge", prompt_ms)
        _, path = programs.finish("judge", 0.0) or ("", 0.0)
    return path


def test_a_fan_in_has_the_longest_path_that_leads_to_it() -> None:
    assert fan_in(table("atlas"), 1) == 1600.0
    programs = table("atlas")
    assert fan_in(programs, 10) == 300.0 + 10 * 1300.0
    assert dict(programs.shown(1))["p"].path_ms == 13_300.0


def test_what_ended_before_a_call_does_not_lead_to_what_goes_on_from_it() -> None:
    programs = table("atlas")
    for call, ms in (("long", 900.0), ("short", 100.0), ("middle", 400.0), ("last", 50.0)):
        programs.arrive(call, "p", 0.0, 0.0)
        programs.charge(call, ms)
        programs.finish(call, 0.0)
    for end, path in ((1, 900.0), (2, 400.0), (3, 400.0), (4, 50.0)):
        programs.arrive(f"from {end}", "p", [900.0, 100.0, 400.0, 50.0][end - 1], 0.0, end=end)
        assert programs.calls[f"from {end}"].program.path_ms == path


def test_nothing_leads_to_a_call_from_a_program_that_was_forgotten() -> None:
    programs = table("atlas", ttl_s=60.0)
    programs.arrive("old", "p", 0.0, 0.0)
    programs.charge("old", 900.0)
    programs.finish("old", 0.0)
    for call in ("new", "fork"):
        programs.arrive(call, "p", 900.0, 100.0, end=1)
        assert programs.level(call, 100.0) == 0


def test_ended_calls_are_remembered_up_to_a_number() -> None:
    programs = table("atlas")
    for number in range(2 * ENDS):
        programs.arrive("call", "p", 1000.0 - number, 0.0)
        programs.finish("call", 0.0)
    longest = dict(programs.shown(1))["p"].longest
    assert [end for end, _ in longest] == list(range(ENDS + 1, 2 * ENDS + 1))


def test_a_named_thread_waits_for_no_other() -> None:
    """Whatever ended since: its path is its own."""
    programs = table("atlas")
    for call, thread, ms in (("a", "x", 100.0), ("b", "y", 900.0)):
        programs.arrive(call, "p", 0.0, 0.0, thread)
        programs.charge(call, ms)
        programs.finish(call, 0.0)
    programs.arrive("x goes on", "p", 100.0, 0.0, "x", end=1)
    programs.arrive("main goes on", "p", 100.0, 0.0, end=1)
    assert [programs.level(call, 0.0) for call in ("x goes on", "main goes on")] == [1, 3]
