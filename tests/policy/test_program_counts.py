"""Where calls are, what programs hold and have decoded, which are shown: tables, and what holds for any history."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.program_tables import NamedTable, table
from vllm_agentserve.policy.program import Program, Stage, identifier


def program(programs: NamedTable, key: str) -> Program:
    return dict(programs.shown(100))[key]


def stages(programs: NamedTable, key: str) -> list[int]:
    return program(programs, key).in_stage[: Stage.PAUSED]


def test_a_call_passes_through_its_stages() -> None:
    programs = table()
    programs.arrive("a", "p", None, 0.0)
    assert stages(programs, "p") == [1, 0, 0, 0]
    programs.prefills("a", False, 100, 0, 60)
    programs.prefills("a", False, 100, 60, 40)
    assert stages(programs, "p") == [0, 1, 0, 0]
    programs.decodes("a")
    assert stages(programs, "p") == [0, 0, 0, 1]
    programs.pauses("a")
    assert stages(programs, "p") == [1, 0, 0, 0]
    programs.prefills("a", True, 100, 80, 20)
    assert stages(programs, "p") == [0, 0, 1, 0]
    programs.finish("a", 1.0)
    assert stages(programs, "p") == [0, 0, 0, 0]
    assert program(programs, "p").turns == 1


def test_what_is_held_and_decoded() -> None:
    programs = table()
    for call in "ab":
        programs.arrive(call, "p", None, 0.0)
    programs.prefills("a", False, 100, 32, 30)
    tally, clock = program(programs, "p"), programs.clock
    assert clock.kv_tokens(tally) == 62
    programs.prefills("a", False, 100, 62, 38)
    programs.decodes("a")
    programs.advance(1.0, 10.0)
    programs.prefills("b", True, 200, 160, 40)
    programs.decodes("b")
    programs.advance(1.0, 20.0)
    assert clock.kv_tokens(tally) == 102 + 201
    assert clock.decoded(tally) == (3, 50.0)
    programs.pauses("a")
    assert clock.kv_tokens(tally) == 201
    programs.advance(1.0, 5.0)
    assert clock.decoded(tally) == (4, 55.0)
    # Computed again after the preemption: it was admitted before.
    programs.prefills("a", True, 100, 96, 6)
    assert (tally.cached_tokens, tally.prompt_tokens) == (192, 300)
    for call in "ab":
        programs.finish(call, 1.0)
    assert (clock.kv_tokens(tally), clock.decoded(tally)) == (0, (4, 55.0))


def test_waiting_calls_are_counted_by_level() -> None:
    programs = table()
    for call in "abc":
        programs.arrive(call, "p", None, 0.0)
    programs.arrive("d", "q", None, 0.0)
    assert programs.waiting == [4, 0, 0, 0]
    programs.prefills("a", False, 10, 0, 10)
    programs.charge("a", 150.0)
    assert [programs.level(call, 0.1) for call in "abcd"] == [1, 1, 1, 0]
    assert programs.waiting == [1, 2, 0, 0]
    assert programs.level("b", 2.0) == 0
    assert programs.waiting == [2, 1, 0, 0]
    for call in "abcd":
        programs.finish(call, 3.0)
    assert programs.waiting == [0, 0, 0, 0]


def test_the_longest_waiting_call_is_first() -> None:
    programs = table()
    for number, call in enumerate("abc"):
        programs.arrive(call, "p", None, float(number))
    programs.prefills("a", False, 10, 0, 10)
    programs.level("b", 5.0)
    programs.pauses("a")
    waiting = program(programs, "p").waiting
    assert list(waiting) == [programs.calls[name].program for name in "bca"]
    assert [call.since for call in waiting] == [1.0, 2.0, 5.0]


def test_programs_by_service() -> None:
    programs = table(ttl_s=60.0)
    for call in "abc":
        programs.arrive(call, call, None, 0.0)
    programs.charge("a", 150.0)
    programs.decodes("b")
    programs.advance(1000.0)
    assert programs.by_service == [2, 1, 0, 0]
    programs.look_again(1, 0.0)
    assert programs.by_service == [1, 1, 0, 1]
    assert programs.service_bounds_ms() == [100.0, 300.0, 700.0]
    for call in "abc":
        programs.finish(call, 0.0)
    for number in range(3):
        programs.arrive(f"later {number}", "d", None, 100.0)
    assert programs.by_service == [1, 0, 0, 0]


def test_decoding_programs_are_looked_at_in_turns() -> None:
    programs = table()
    for number in range(10):
        programs.arrive(str(number), str(number), None, 0.0)
        programs.decodes(str(number))
    programs.advance(1000.0)
    for seen in (4, 8, 10):
        programs.look_again(4, 0.0)
        assert programs.by_service == [10 - seen, 0, 0, seen]


def test_who_is_shown() -> None:
    programs = table()
    for number in range(30):
        programs.arrive(f"c{number}", f"p{number}", None, float(number))
        if number % 3:
            programs.finish(f"c{number}", float(number))
    shown = [key for key, _ in programs.shown(16)]
    assert shown[:10] == [f"p{number}" for number in range(27, -1, -3)]
    assert shown[10:] == ["p29", "p28", "p26", "p25", "p23", "p22"]
    assert [key for key, _ in programs.shown(4)] == ["p27", "p24", "p21", "p18"]
    assert not list(table().shown(16))


@pytest.mark.parametrize(
    ("key", "number"),
    [("session abc", 0xBA7816), ("abc", 0xBA7816), ("session ", 0xE3B0C4), ("session \ud800", identifier("\ud800"))],
)
def test_identifiers(key: str, number: int) -> None:
    assert identifier(key) == number < 1 << 24


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["arrive", "cold", "resume", "decodes", "pauses", "advance", "level", "look", "finish"]),
            st.integers(0, 5),
        ),
        max_size=80,
    )
)
def test_counts_agree_with_the_calls(history: list[tuple[str, int]]) -> None:
    """Whatever the order of events: stages, levels and services add up, and what is held is what live calls hold."""
    programs = table(ttl_s=1e9)
    live: dict[str, Stage] = {}
    held: dict[str, int] = {}
    decoded = 0
    for now, (what, which) in enumerate(history):
        call, key = f"c{which}", f"p{which % 3}"
        if what == "arrive" and call not in live:
            programs.arrive(call, key, None, float(now))
            live[call], held[call] = Stage.WAITING, 0
        elif what == "advance":
            programs.advance(50.0, 10.0)
            for one, stage in live.items():
                held[one] += stage is Stage.DECODING
                decoded += stage is Stage.DECODING
        elif what == "look":
            programs.look_again(2, float(now))
        elif call in live:
            if what in ("cold", "resume"):
                programs.prefills(call, what == "resume", 40, held[call], 7)
                live[call], held[call] = Stage.RESUME if what == "resume" else Stage.COLD, held[call] + 7
            elif what == "decodes":
                programs.decodes(call)
                live[call] = Stage.DECODING
            elif what == "pauses":
                programs.pauses(call)
                held[call] = 0 if live[call] is not Stage.WAITING else held[call]
                live[call] = Stage.WAITING
            elif what == "level":
                programs.level(call, float(now))
            elif what == "finish":
                programs.finish(call, float(now))
                del live[call], held[call]
    tallies = [one for _, one in programs.shown(10)]
    for stage in list(Stage)[: Stage.DONE]:
        assert sum(tally.in_stage[stage] for tally in tallies) == list(live.values()).count(stage)
    assert sum(programs.waiting) == list(live.values()).count(Stage.WAITING)
    assert sum(programs.by_service) == len(programs) == len(tallies)
    assert sum(programs.clock.kv_tokens(tally) for tally in tallies) == sum(held.values())
    assert sum(programs.clock.decoded(tally)[0] for tally in tallies) == decoded
    assert set(programs.active(10)) == {f"p{int(call[1:]) % 3}" for call in live}


def test_a_second_call_of_a_program_is_another_turn() -> None:
    programs = table()
    for call in "ab":
        programs.arrive(call, "p", None, 0.0)
    assert program(programs, "p").turns == 2
    assert programs.active(10) == ["p"]
    programs.finish("a", 1.0)
    assert programs.active(10) == ["p"]
    programs.finish("b", 1.0)
    assert programs.active(10) == []


def test_a_call_that_moves_leaves_its_level() -> None:
    programs = table()
    for call in "abc":
        programs.arrive(call, "p", None, 0.0)
    assert programs.waiting == [3, 0, 0, 0]
    programs.charge("a", 150.0)
    programs.level("a", 0.0)
    assert programs.waiting == [2, 1, 0, 0]


def test_clocks_begin_at_nothing() -> None:
    programs = table()
    programs.arrive("a", "p", None, 0.0)
    programs.decodes("a")
    tally = program(programs, "p")
    assert (tally.decode_tokens, tally.decode_ms, tally.kv_tokens) == (0, 0.0, 0)
