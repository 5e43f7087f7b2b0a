"""What programs have received and at which level their calls wait: tables, and what holds for any history."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.calls import call_of
from tests.support.program_tables import table
from vllm_agentserve.policy.call import Backlog, Call
from vllm_agentserve.policy.order import AdmissionKey, Urgency
from vllm_agentserve.policy.programs import ProgramTable
from vllm_agentserve.policy.waiting import WaitingList


@pytest.mark.parametrize(
    ("service_ms", "level"), [(0, 0), (99, 0), (100, 1), (299, 1), (300, 2), (699, 2), (700, 3), (1e9, 3)]
)
def test_every_level_has_twice_the_room_of_the_one_before(service_ms: float, level: int) -> None:
    programs = table()
    programs.arrive("one", "p", None, 0.0)
    programs.charge("one", service_ms)
    programs.finish("one", 0.0)
    programs.arrive("two", "p", None, 0.0)
    assert programs.level("two", 0.0) == level


def test_decoding_calls_share_a_clock() -> None:
    programs = table()
    for call, key in (("a", "p"), ("b", "p"), ("c", "q")):
        programs.arrive(call, key, None, 0.0)
    programs.decodes("a")
    programs.advance(10.0)
    programs.decodes("b")
    programs.decodes("b")
    programs.advance(5.0)
    assert (programs.service_ms("a"), programs.service_ms("c")) == (20.0, 0.0)
    programs.pauses("a")
    programs.pauses("a")
    programs.advance(1.0)
    assert programs.service_ms("a") == 21.0
    programs.decodes("a")
    programs.advance(1.0)
    assert programs.finish("a", 0.0) == ("p", 16.0)
    assert programs.finish("b", 0.0) == ("p", 7.0)
    assert programs.finish("b", 0.0) is None


def test_least_attained_service_counts_the_whole_program() -> None:
    programs = table("plas")
    for call in ("thread-1", "thread-2"):
        programs.arrive(call, "wide", 0.0, 0.0)
        programs.charge(call, 90.0)
    programs.arrive("next", "wide", 0.0, 0.0)
    programs.arrive("other", "narrow", 0.0, 0.0)
    assert (programs.level("next", 0.0), programs.level("other", 0.0)) == (1, 0)


def test_the_critical_path_does_not_add_up_threads() -> None:
    """A fork into three threads of 90 ms each, and a join: the path is the fork's call and one thread."""
    programs = table("atlas")
    programs.arrive("fork", "p", 0.0, 0.0)
    programs.charge("fork", 50.0)
    _, path = programs.finish("fork", 0.0) or ("", 0.0)
    for thread in "xyz":
        programs.arrive(thread, "p", path, 0.0)
        assert programs.level(thread, 0.0) == 0
        programs.charge(thread, 90.0)
    ends = [programs.finish(thread, 0.0) for thread in "xyz"]
    assert ends == [("p", 140.0)] * 3
    programs.arrive("join", "p", None, 0.0)
    assert programs.service_ms("join") == 320.0
    assert programs.level("join", 0.0) == 1
    programs.charge("join", 10.0)
    assert programs.finish("join", 0.0) == ("p", 150.0)


def test_who_has_waited_too_long_for_what_it_got_is_promoted_once() -> None:
    programs = table(promote_ratio=10.0)
    programs.arrive("one", "p", None, 0.0)
    programs.charge("one", 800.0)
    programs.finish("one", 0.0)
    programs.arrive("two", "p", None, 100.0)
    assert programs.level("two", 108.0) == 3
    assert programs.level("two", 108.1) == 0
    assert programs.level("two", 108.2) == 0
    assert programs.promotions == 1
    # A program that got next to nothing waits for at least ten quanta.
    programs.arrive("new", "q", None, 0.0)
    programs.charge("new", 1.0)
    assert programs.level("new", 0.9) == 0
    assert programs.promotions == 1


def test_programs_without_calls_age_out() -> None:
    programs = table(ttl_s=60.0)
    for key in ("idle", "live"):
        programs.arrive(key, key, None, 0.0)
    programs.charge("idle", 500.0)
    programs.finish("idle", 0.0)
    programs.arrive("x", "other", None, 59.0)
    assert len(programs) == 3
    programs.arrive("y", "other", None, 61.0)
    assert len(programs) == 2
    programs.arrive("back", "idle", None, 61.0)
    assert programs.service_ms("back") == 0.0


def test_the_number_of_programs_is_bounded() -> None:
    programs = table(capacity=10)
    programs.arrive("live", "live", None, 0.0)
    for n in range(200):
        programs.arrive(f"c{n}", f"p{n}", None, float(n))
        programs.finish(f"c{n}", float(n))
    assert len(programs) <= 12
    assert programs.service_ms("live") == 0.0


def test_unknown_calls_cost_and_get_nothing() -> None:
    programs = table()
    programs.charge("nobody", 5.0)
    programs.decodes("nobody")
    programs.pauses("nobody")
    assert programs.level("nobody", 0.0) == 0
    assert programs.finish("nobody", 0.0) is None
    assert "nobody" not in programs


events = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "charge", "decodes", "pauses", "advance", "finish"]),
        st.integers(0, 5),
        st.integers(1, 50),
    ),
    max_size=80,
)


@given(events, st.sampled_from(["plas", "atlas"]))
def test_service_is_conserved(history: list[tuple[str, int, int]], policy: str) -> None:
    """What was charged and what the clock gave to decoding calls is what programs have, whatever happened in between."""
    programs = table(policy, ttl_s=1e9)
    live: dict[str, int] = {}
    decoding: set[str] = set()
    given = dict.fromkeys(range(3), 0.0)
    for number, (what, which, amount) in enumerate(history):
        call = f"call-{which}"
        if what == "arrive" and call not in live:
            live[call] = which % 3
            programs.arrive(call, f"p{which % 3}", None, float(number))
        elif what == "advance":
            programs.advance(amount)
            for one in decoding:
                given[live[one]] += amount
        elif call in live:
            if what == "charge":
                programs.charge(call, amount)
                given[live[call]] += amount
            elif what == "decodes":
                programs.decodes(call)
                decoding.add(call)
            elif what == "pauses":
                programs.pauses(call)
                decoding.discard(call)
            elif what == "finish":
                assert programs.finish(call, float(number)) is not None
                decoding.discard(call)
                del live[call]
    for call, program in live.items():
        assert programs.service_ms(call) == pytest.approx(given[program])
        assert 0 <= programs.level(call, float(len(history))) < 4


@pytest.mark.parametrize("policy", ["plas", "atlas"])
def test_the_time_a_call_ran_is_not_waiting(policy: str) -> None:
    """It ran for two minutes and received 650 ms of a crowded engine: it waits at the level at which it stood."""
    programs = table(policy)
    programs.arrive("long", "p", 0.0, 0.0)
    programs.prefills("long", False, 10, 0, 10, 0.0)
    programs.charge("long", 50.0)
    programs.decodes("long")
    programs.advance(600.0)
    assert programs.standing("long") == 2
    programs.pauses("long", 120.0)
    assert (programs.level("long", 120.1), programs.promotions, programs.standing("long")) == (2, 0, 2)


def test_waits_add_up() -> None:
    """Ten times 650 ms: four seconds before it ran, and 2.5 after it had lost its place."""
    programs = table(promote_ratio=10.0)
    programs.arrive("long", "p", None, 0.0)
    programs.prefills("long", False, 10, 0, 10, 4.0)
    programs.charge("long", 650.0)
    programs.decodes("long")
    programs.pauses("long", 100.0)
    assert (programs.level("long", 102.4), programs.promotions) == (2, 0)
    assert (programs.level("long", 102.6), programs.promotions) == (0, 1)
    assert (programs.level("long", 102.7), programs.promotions) == (0, 1)
    programs.prefills("long", True, 10, 0, 10, 103.0)
    assert programs.calls["long"].program.waited_s == pytest.approx(7.0)


def test_a_program_ages_out_while_older_ones_run() -> None:
    programs = table(ttl_s=60.0)
    for number in range(10):
        programs.arrive(f"runs {number}", f"live {number}", None, 0.0)
    programs.arrive("idle", "idle", None, 0.0)
    programs.charge("idle", 500.0)
    programs.finish("idle", 1.0)
    programs.arrive("back", "idle", None, 62.0)
    assert programs.service_ms("back") == 0.0
    for number in range(200):
        programs.arrive(f"call {number}", f"short {number}", None, 100.0 + number)
        programs.finish(f"call {number}", 100.5 + number)
    assert len(programs) <= 11 + 62
    assert programs.by_service[0] == len(programs)
    assert programs.faults([*(f"runs {number}" for number in range(10)), "back"]) == []


def test_a_program_ages_out_behind_others_that_have_not() -> None:
    """There are a hundred of them: more than an arrival looks at."""
    programs = table(ttl_s=60.0)
    for number in range(100):
        programs.arrive(f"c{number}", f"p{number}", None, 0.0)
        programs.charge(f"c{number}", 500.0)
    for number in range(99, -1, -1):
        programs.finish(f"c{number}", float(100 - number))
    programs.arrive("back", "p50", None, 110.1)
    assert programs.service_ms("back") == 0.0
    programs.arrive("not yet", "p49", None, 110.1)
    assert programs.service_ms("not yet") == 500.0


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 400)), max_size=60),
    st.sampled_from([10.0, 1e9]),
)
def test_programs_kept_are_those_seen_in_time(history: list[tuple[bool, int, int]], ttl_s: float) -> None:
    """A program has what its calls received since it was last away for longer than its time, whatever else runs."""
    programs = table(ttl_s=ttl_s)
    received, seen, live = dict.fromkeys(range(6), 0), dict.fromkeys(range(6), 0.0), set[int]()
    now = 0.0
    for arrives, which, amount in history:
        now += amount / 100
        if arrives and which not in live:
            programs.arrive(f"c{which}", f"p{which}", None, now)
            received[which] = 0 if now - seen[which] > ttl_s else received[which]
            live.add(which)
        elif which in live:
            programs.charge(f"c{which}", amount)
            received[which] += amount
            if amount % 2:
                programs.finish(f"c{which}", now)
                live.remove(which)
                seen[which] = now
        for one in live:
            assert programs.service_ms(f"c{one}") == received[one]
    assert programs.faults({f"c{one}" for one in live}) == []


class Waiting:
    """Calls that wait by the levels of their programs, on a clock; some of them cannot run."""

    def __init__(self) -> None:
        self.now, self.blocked = 0.0, set[Call]()
        self.table = ProgramTable("plas", levels=4, quantum_ms=100.0, promote_ratio=10.0)
        self.list = WaitingList(
            self._key_of, decide_steps=1, clock=lambda: self.now, is_blocked=lambda call: call in self.blocked
        )

    def _key_of(self, call: Call) -> AdmissionKey:
        self.table.update_level(call, self.now)
        return AdmissionKey(Urgency.NORMAL, False, level=self.table.standing(call), arrival=call.number, tokens=100)

    def add(self, name: str, blocked: bool = False) -> Call:
        call = call_of(name)
        if blocked:
            self.blocked.add(call)
        self.table.arrive(call, name, None, self.now)
        self.list.add(call)
        return call

    def step(self, now: float) -> None:
        self.now = now
        self.list.begin_step(self.list.step + 1, relevels=True)


def test_the_time_a_call_could_not_run_promotes_nobody() -> None:
    """A minute for its grammar; what counts is the wait before and after."""
    waiting = Waiting()
    waiting.table.arrive(call := call_of("long"), "long", None, 0.0)
    waiting.table.charge(call, 800.0)
    waiting.blocked.add(call)
    waiting.list.add(call)
    for now in (1.0, 30.0, 60.0):
        waiting.step(now)
    waiting.blocked.clear()
    waiting.step(60.5)
    assert (waiting.table.standing(call), waiting.table.promotions) == (3, 0)
    waiting.step(68.0)
    assert (waiting.table.standing(call), waiting.table.promotions) == (3, 0)
    waiting.step(69.0)
    assert (waiting.table.standing(call), waiting.table.promotions) == (0, 1)
    assert waiting.list.faults([call]) == []


def test_the_time_a_call_could_not_run_is_not_time_its_client_has_waited_for_steps() -> None:
    """By which the target between tokens is chosen."""
    waiting = Waiting()
    waiting.add("other")
    call = waiting.add("blocked", blocked=True)
    waiting.step(60.0)
    assert waiting.list.backlog() == Backlog(1, 100, pytest.approx(60_000.0))
    waiting.blocked.clear()
    waiting.step(60.0)
    assert waiting.list.backlog() == Backlog(2, 200, pytest.approx(30_000.0))
    waiting.now = 61.0
    assert waiting.list.backlog() == Backlog(2, 200, pytest.approx(31_000.0))
    assert call.could_not_run_s(61.0) == 60.0
