"""Whose copies make room in host memory."""

from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_agentserve.policy.gaps import Returns
from vllm_agentserve.policy.hosting import Copy, Hosting


def anything(copy: Copy) -> bool:
    return True


def returning(gap_s: float = 1.0) -> Returns:
    """Everybody comes back, after so long."""
    returns = Returns()
    for turn in range(1, 7):
        for _ in range(8):
            returns.returned((True, turn), None, gap_s, revised=False)
    return returns


def stored(hosting: Hosting, name: str, blocks: int, first: int = 0) -> None:
    for place in range(first, blocks):
        hosting.store(name, f"{name}{place}", place)


def turn(hosting: Hosting, name: str, now_s: float, blocks: int, *, last: bool = False) -> None:
    """A call that takes no time."""
    hosting.arrive(name, now_s)
    hosting.admit(name)
    stored(hosting, name, blocks)
    hosting.end(name, now_s, last=last)
    hosting.use(name, ((f"{name}{place}", place) for place in range(blocks)))


def test_where_nobody_comes_back_the_longest_unused_go_first_from_their_ends() -> None:
    hosting = Hosting()
    for now_s, name in enumerate("abc"):
        turn(hosting, name, now_s, 3)
    assert hosting.make_room(4, 3.0, anything) == ["a2", "a1", "a0", "b2"]
    assert len(hosting) == 5
    hosting.use("b", [("b0", 0)])
    assert hosting.make_room(2, 4.0, anything) == ["c2", "c1"]
    assert hosting.faults() == []


def test_requests_of_no_known_program_go_as_they_were_used() -> None:
    hosting = Hosting(returning())
    stored(hosting, "request 1", 2)
    turn(hosting, "a", 0.0, 2)
    stored(hosting, "request 2", 2)
    assert hosting.make_room(5, 0.1, anything) == ["request 11", "request 10", "request 21", "request 20", "a1"]


def test_who_is_expected_last_makes_room_and_goes_on_until_it_is_gone() -> None:
    hosting = Hosting(returning())
    for now_s, name in ((0.0, "a"), (0.2, "b"), (0.4, "c")):
        turn(hosting, name, now_s, 3)
    assert hosting.make_room(1, 0.5, anything) == ["c2"]
    turn(hosting, "d", 0.6, 3)
    assert hosting.make_room(3, 0.7, anything) == ["c1", "c0", "d2"]
    assert hosting.faults() == []


def test_who_makes_room_stops_when_it_has_a_call() -> None:
    hosting = Hosting(returning())
    for now_s, name in ((0.0, "a"), (0.2, "b")):
        turn(hosting, name, now_s, 3)
    assert hosting.make_room(1, 0.3, anything) == ["b2"]
    hosting.arrive("b", 0.4)
    assert hosting.make_room(1, 0.4, anything) == ["a2"]


def test_who_runs_goes_before_those_that_are_back_sooner_and_who_waits_goes_last() -> None:
    hosting = Hosting(returning())
    for name in "abc":
        turn(hosting, name, 0.0, 2)
    for name in "ab":
        hosting.arrive(name, 0.8)
    hosting.admit("a")
    assert hosting.make_room(6, 0.8, anything) == ["a1", "a0", "c1", "c0", "b1", "b0"]


def test_who_asks_for_room_gives_its_own_when_nothing_else_is_left() -> None:
    hosting = Hosting(returning())
    turn(hosting, "a", 0.0, 2)
    hosting.arrive("b", 0.1)
    hosting.admit("b")
    stored(hosting, "b", 3)
    assert hosting.make_room(3, 0.1, anything, but="b") == ["a1", "a0", "b2"]


def test_a_call_that_is_said_to_be_the_last_makes_its_program_go_first() -> None:
    hosting = Hosting(returning())
    turn(hosting, "a", 0.0, 2, last=True)
    turn(hosting, "b", 0.9, 2)
    assert hosting.make_room(2, 1.0, anything) == ["a1", "a0"]


def test_clients_that_call_every_call_the_last_are_not_believed() -> None:
    hosting = Hosting(returning())
    for number in range(6):
        turn(hosting, "a", number, 2, last=True)
    for now_s, name in ((6.0, "a"), (6.2, "b")):
        turn(hosting, name, now_s, 2, last=True)
    assert hosting.make_room(1, 6.3, anything) == ["b1"], "as if nothing had been said"


def test_who_stays_away_for_too_long_goes_first() -> None:
    hosting = Hosting(returning(0.1))
    turn(hosting, "a", 0.0, 2)
    turn(hosting, "b", 1e5, 2)
    assert hosting.make_room(2, 1e5 + 0.01, anything) == ["a1", "a0"]


def test_what_several_contexts_begin_with_stays_as_long_as_one_of_them() -> None:
    hosting = Hosting(returning())
    for now_s, name in ((0.0, "a"), (0.2, "b")):
        hosting.arrive(name, now_s)
        hosting.admit(name)
        hosting.store(name, "system", 0)
        hosting.store(name, f"{name}1", 1)
        hosting.end(name, now_s)
    assert hosting.make_room(2, 0.3, anything) == ["b1", "a1"]
    assert "system" in hosting
    assert hosting.make_room(1, 0.3, anything) == ["system"]
    assert (len(hosting), hosting.faults()) == (0, [])


def test_what_another_context_begins_with_stays_when_its_program_goes_on_making_room() -> None:
    hosting = Hosting(returning())
    for now_s, name, blocks in ((0.0, "a", 2), (0.2, "b", 1), (0.4, "c", 3)):
        hosting.arrive(name, now_s)
        hosting.admit(name)
        for place in range(blocks):
            hosting.store(name, "system" if name != "b" and not place else f"{name}{place}", place)
        hosting.end(name, now_s)
    assert hosting.make_room(1, 0.5, anything) == ["c2"]
    assert hosting.make_room(3, 0.5, anything) == ["c1", "b0", "a1"]
    assert "system" in hosting
    assert hosting.faults() == []


def test_what_a_call_found_of_others_becomes_part_of_its_context() -> None:
    hosting = Hosting(returning())
    turn(hosting, "a", 0.0, 2, last=True)
    hosting.arrive("b", 0.1)
    hosting.admit("b")
    hosting.store("b", "b1", 1)
    hosting.end("b", 0.1)
    hosting.use("b", [("a0", 0), ("b1", 1), ("gone", 2)])
    assert hosting.make_room(3, 0.2, anything) == ["a1", "b1", "a0"]
    assert hosting.faults() == []


def test_copies_that_must_stay_keep_what_is_before_them() -> None:
    hosting = Hosting(returning())
    for now_s, name in ((0.0, "a"), (0.2, "b")):
        turn(hosting, name, now_s, 3)
    assert hosting.make_room(1, 0.3, lambda copy: copy != "b2") == ["a2"]
    assert hosting.make_room(4, 0.3, lambda copy: copy != "b2") == ["a1", "a0", "b1", "b0"], "nothing else is left"


def test_where_there_is_not_enough_nothing_changes() -> None:
    hosting = Hosting(returning())
    turn(hosting, "a", 0.0, 3)
    assert hosting.make_room(3, 0.1, lambda copy: copy != "a2") is None
    assert hosting.make_room(4, 0.1, anything) is None
    assert (len(hosting), hosting.faults()) == (3, [])


def test_blocks_that_come_in_another_order_are_put_in_their_places() -> None:
    hosting = Hosting()
    for place in (2, 0, 1):
        hosting.store("a", place, place)
    assert hosting.make_room(3, 0.0, anything) == [2, 1, 0]


def test_a_copy_that_failed_is_dropped_and_a_reset_drops_all() -> None:
    hosting = Hosting(returning())
    turn(hosting, "a", 0.0, 2)
    hosting.drop("a1")
    hosting.drop("unknown")
    assert len(hosting) == 1
    hosting.clear()
    assert (len(hosting), hosting.faults(), hosting.make_room(0, 0.1, anything)) == (0, [], [])
    turn(hosting, "a", 1.0, 2)
    assert hosting.make_room(1, 1.1, anything) == ["a1"]


def test_a_call_that_never_ran_leaves_nobody_waiting() -> None:
    hosting = Hosting(returning())
    for now_s, name in ((0.0, "a"), (0.2, "b")):
        turn(hosting, name, now_s, 1)
    hosting.arrive("b", 0.3)
    hosting.abort("b", 0.3, waited=True)
    assert hosting.make_room(1, 0.3, anything) == ["b0"]


def test_programs_are_remembered_while_they_have_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_agentserve.policy.expected_back.PROGRAMS_KEPT", 20)
    hosting = Hosting(returning())
    turn(hosting, "a", 0.0, 1)
    for number in range(100):
        turn(hosting, f"program {number}", 0.0, 0)
    assert len(hosting._programs) == 20
    assert hosting.make_room(1, 0.1, anything) == ["a0"]


def not_every_third(copy: Copy) -> bool:
    assert isinstance(copy, tuple)
    return copy[1] % 3 != 0


Step = tuple[int, int, int, bool]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5), st.integers(0, 9), st.booleans()), max_size=60),
    st.booleans(),
)
def test_books_agree_and_pinned_copies_stay(steps: list[Step], learned: bool) -> None:
    hosting = Hosting(returning(0.5) if learned else None)
    kept: set[Copy] = set()
    calls: list[tuple[str, bool]] = []
    now_s = 0.0
    for action, which, amount, flag in steps:
        now_s += amount / 10
        name = f"p{which}"
        if action == 0:
            hosting.arrive(name, now_s, named=flag)
            calls.append((name, False))
        elif action == 1 and (name, False) in calls:
            calls[calls.index((name, False))] = name, True
            hosting.admit(name)
        elif action == 2 and (name, True) in calls:
            calls.remove((name, True))
            hosting.end(name, now_s, last=flag)
        elif action == 3 and (name, flag) in calls:
            calls.remove((name, flag))
            hosting.abort(name, now_s, waited=not flag)
        elif action == 4:
            for place in range(amount):
                copy = ("shared" if place < 2 else name, place)
                if copy not in kept:
                    hosting.store(name, copy, place)
                    kept.add(copy)
            hosting.use(name, ((("shared" if place < 2 else name, place), place) for place in range(amount)))
        elif action == 5:
            pinned = not_every_third if flag else anything
            found = hosting.make_room(amount, now_s, pinned, name if flag else None)
            free = {copy for copy in kept if pinned(copy)}
            assert (found is None) == (len(free) < amount)
            if found is not None:
                assert len(found) == len({*found}) == amount
                assert {*found} <= free
                kept -= {*found}
        elif action == 6 and kept:
            copy = sorted(kept)[amount % len(kept)]  # type: ignore[type-var]
            hosting.drop(copy)
            kept.remove(copy)
        assert hosting.faults() == []
        assert len(hosting) == len(kept)
    rest = hosting.make_room(len(kept), now_s, anything)
    assert rest is not None
    assert {*rest} == kept


def shared_prompt(hosting: Hosting, name: str, blocks: int = 8) -> None:
    """A call that found all blocks of its prompt in host memory, or stored them."""
    for place in range(blocks):
        if f"system{place}" not in hosting:
            hosting.store(name, f"system{place}", place)
    hosting.use(name, [(f"system{place}", place) for place in range(blocks)])


@pytest.mark.parametrize("returns", [False, True])
def test_programs_that_share_a_prompt_are_not_remembered_for_as_long_as_it_is_kept(
    monkeypatch: pytest.MonkeyPatch, returns: bool
) -> None:
    monkeypatch.setattr("vllm_agentserve.policy.hosting.PARTS", 64)
    hosting = Hosting(returning(0.1) if returns else None)
    for number in range(1000):
        hosting.arrive(f"p{number}", 1e5 * number)
        hosting.admit(f"p{number}")
        hosting.end(f"p{number}", 1e5 * number)
        shared_prompt(hosting, f"p{number}")
    assert len(hosting._contexts) <= 16
    assert len(hosting._first) <= 16
    assert len(hosting.context("p999")) == len(hosting) == 8
    assert hosting.faults() == []


def test_what_only_one_program_has_stays_its_own_when_contexts_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_agentserve.policy.hosting.PARTS", 64)
    hosting = Hosting()
    for number in range(100):
        shared_prompt(hosting, f"p{number}")
        hosting.store(f"p{number}", f"own{number}", 8)
        hosting.use(f"p{number}", [(f"own{number}", 8)])
    assert hosting.faults() == []
    assert sum(map(len, hosting._contexts.values())) <= 4 * len(hosting)
    assert hosting.make_room(100, 0.0, anything) == [f"own{number}" for number in range(100)], (
        "the longest unused first"
    )
    assert len(hosting) == 8


def test_a_program_comes_when_all_that_are_remembered_have_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_agentserve.policy.expected_back.PROGRAMS_KEPT", 20)
    hosting = Hosting()
    for number in range(30):
        turn(hosting, f"p{number}", number, 1)
    assert len(hosting._programs) == 30
    assert hosting.make_room(30, 40.0, anything) is not None
    for number in range(30, 80):
        turn(hosting, f"p{number}", number, 0)
    assert len(hosting._programs) <= 30


def test_a_context_that_was_written_anew_takes_no_longer_to_store_than_another() -> None:
    """A sort for each block takes seconds."""
    blocks = 4_000
    hosting = Hosting()
    for place in range(blocks):
        hosting.store("a", ("old", place), place)
    began_s = process_time()
    for place in range(blocks):
        hosting.store("a", ("new", place), place)
    assert process_time() - began_s < 1.0
    assert hosting.make_room(2, 0.0, anything) == [("new", blocks - 1), ("old", blocks - 1)]
    assert hosting.faults() == []


def test_who_lost_its_place_does_not_make_room() -> None:
    hosting = Hosting()
    for name in "ab":
        hosting.arrive(name, 0.0)
        hosting.admit(name)
        stored(hosting, name, 2)
    hosting.waits_anew("a")
    assert hosting.make_room(3, 0.1, anything) == ["b1", "b0", "a1"]
    hosting.admit("a")
    stored(hosting, "b", 2)
    hosting.waits_anew("unknown")
    assert hosting.make_room(1, 0.2, anything) == ["a0"], "it runs, and nobody was seen to come back"
    assert hosting.faults() == []


def test_what_many_contexts_begin_with_does_not_make_room_slow() -> None:
    programs, common = 1000, 150
    hosting = Hosting(returning())
    for number in range(programs):
        name = f"p{number}"
        hosting.arrive(name, 0.0)
        hosting.admit(name)
        hosting.end(name, 0.0)
        shared_prompt(hosting, name, common)
        hosting.store(name, name, common)
    began_s = process_time()
    assert hosting.make_room(300, 0.1, anything) is not None
    assert process_time() - began_s < 0.2
    assert len(hosting) == programs + common - 300
