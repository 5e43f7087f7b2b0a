"""The table of pins and the ingresses that ask it."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from vllm_agentserve.cluster import table
from vllm_agentserve.cluster.caller import Caller
from vllm_agentserve.cluster.chooser import KNOWN_S, Chooser
from vllm_agentserve.cluster.load import Report
from vllm_agentserve.cluster.settings import ClusterSettings
from vllm_agentserve.cluster.table import MOST_GONE, NAMED_S, UNREACHED_S, PinTable, Reports
from vllm_agentserve.policy.fleet import rendezvous
from vllm_agentserve.policy.pins import Pins
from vllm_agentserve.policy.placement import EngineLoad

LOADS: dict[str, Report | None] = {name: Report(1, EngineLoad(0, 0, 0, 10_000)) for name in "abc"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Near:
    """A table in this process that counts how often it is asked, and may not be reached."""

    def __init__(self, clock: Clock, **settings: Any) -> None:
        self._settings, self._clock = ClusterSettings("model", **settings).mapping(), clock
        self.table = PinTable(self._settings, clock)
        self.asked = self.turns = 0
        self.up = True
        self.slow_s = 0.0

    async def place(
        self, session: str, tokens: int, parent: str | None, reports: Reports, gone: tuple[str, ...], missed: int
    ) -> tuple[str, str]:
        await asyncio.sleep(self.slow_s)
        if not self.up:
            raise RuntimeError("the actor has died")
        self.asked += 1
        return self.table.place(session, tokens, parent, reports, gone, missed)

    def turn(self, session: str, tokens: int, engine: str) -> None:
        if not self.up:
            raise RuntimeError("the actor has died")
        self.turns += 1
        self.table.turn(session, tokens, engine)

    async def finished(self, session: str, engine: str, context_tokens: int, last: bool) -> None:
        self.table.finished(session, engine, context_tokens, last)

    def start_again(self) -> None:
        """Empty."""
        self.table = PinTable(self._settings, self._clock)


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_the_table_is_asked_once_a_conversation(clock: Clock) -> None:
    near = Near(clock)
    chooser = Chooser(near, clock=clock)
    engines = {await chooser.choose(Caller("s"), 100, LOADS) for _ in range(20)}
    assert len(engines) == 1
    assert (near.asked, near.turns) == (1, 19)
    assert near.table.shown()["decisions"] == {"first": 1, "pinned": 19}
    assert near.table.shown()["pins"] == 1


async def test_a_client_that_leaves_while_the_table_is_asked_leaves_no_call_behind(clock: Clock) -> None:
    near = Near(clock, pin_seconds=10.0)
    near.slow_s = 0.05
    chooser = Chooser(near, pin_seconds=10.0, clock=clock)
    asking = [asyncio.ensure_future(chooser.choose(Caller(f"{number}"), 100, LOADS)) for number in range(6)]
    await asyncio.sleep(0.01)
    for one in asking:
        one.cancel()
    found = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in found)
    await asyncio.sleep(0.2)
    assert near.asked == 6
    assert not chooser._leaving
    # A call that went on would keep its conversation.
    clock.now += 11.0
    near.table.place("later", 100, None, LOADS)
    assert near.table.shown()["pins"] == 1


async def test_what_an_ingress_knows_gets_old(clock: Clock) -> None:
    near = Near(clock)
    chooser = Chooser(near, clock=clock)
    first = await chooser.choose(Caller("s"), 100, LOADS)
    clock.now = KNOWN_S
    assert await chooser.choose(Caller("s"), 100, LOADS) == first
    assert near.asked == 2


async def test_two_ingresses_agree_on_two_hundred_conversations(clock: Clock) -> None:
    near = Near(clock)
    one, other = Chooser(near, clock=clock), Chooser(near, clock=clock)
    split = 0
    for number in range(200):
        caller = Caller(f"session {number}")
        places = {await (one, other)[turn % 2].choose(caller, 100, LOADS) for turn in range(5)}
        split += len(places) > 1
    assert split == 0
    assert near.asked == 400


async def test_a_conversation_moves_once_when_its_engine_is_gone(clock: Clock) -> None:
    near = Near(clock)
    chooser = Chooser(near, clock=clock)
    first = await chooser.choose(Caller("s"), 100, LOADS)
    left = {name: load for name, load in LOADS.items() if name != first}
    second = await chooser.choose(Caller("s"), 100, left)
    assert second in left
    assert {await chooser.choose(Caller("s"), 100, left) for _ in range(5)} == {second}
    assert near.table.shown()["moves"] == 1
    assert first not in near.table.shown()["resident_tokens"]


async def test_an_engine_that_does_not_answer_is_left_by_all_ingresses(clock: Clock) -> None:
    """One ingress found it out; Ray still shows the engine to the other one."""
    near = Near(clock)
    one, other = Chooser(near, clock=clock), Chooser(near, clock=clock)
    first = await one.choose(Caller("s"), 100, LOADS)
    second = await one.choose(Caller("s"), 100, LOADS, avoid=(first,))
    assert second != first
    assert await other.choose(Caller("s"), 100, LOADS) == second
    assert await one.choose(Caller("s"), 100, LOADS) == second


async def test_the_last_engine_is_tried_again(clock: Clock) -> None:
    near = Near(clock)
    chooser = Chooser(near, clock=clock)
    assert await chooser.choose(Caller("s"), 100, {"a": None}, avoid=("a",)) == "a"


async def test_sub_agents_begin_where_their_parent_is(clock: Clock) -> None:
    near = Near(clock)
    chooser = Chooser(near, clock=clock)
    home = await chooser.choose(Caller("parent"), 10, LOADS)
    assert await chooser.choose(Caller("child", parent="parent"), 10, LOADS) == home
    assert near.table.shown()["decisions"] == {"first": 1, "parent": 1}


async def test_calls_without_a_session_are_not_remembered(clock: Clock) -> None:
    near = Near(clock)
    chooser = Chooser(near, clock=clock)
    for _ in range(6):
        await chooser.choose(Caller(), 100, LOADS)
    assert near.asked == 6
    assert near.table.shown()["pins"] == 0


@pytest.mark.parametrize("policy", ["autellix", "round-robin", "least-loaded", "hash"])
async def test_policies_that_do_not_always_pin_are_asked_every_time(clock: Clock, policy: str) -> None:
    near = Near(clock, policy=policy)
    chooser = Chooser(near, policy, clock=clock)
    for _ in range(6):
        await chooser.choose(Caller("s"), 100, LOADS)
    assert near.asked == 6


async def test_without_a_table_calls_go_by_hash(clock: Clock) -> None:
    """Both ingresses go to the same engine, go by the table once it is there, and say how often it was not."""
    near = Near(clock)
    near.up = False
    one, other = Chooser(near, clock=clock), Chooser(near, clock=clock)
    for session in ("s", "t", "u"):
        places = {await chooser.choose(Caller(session), 100, LOADS) for chooser in (one, other, one)}
        assert places == {rendezvous(session, LOADS)}
    assert {await one.choose(Caller(), 100, LOADS) for _ in range(30)} == set(LOADS)
    near.up = True
    await one.choose(Caller("s"), 100, LOADS)
    await other.choose(Caller("s"), 100, LOADS)
    assert near.table.shown()["decisions"] == {"first": 1, "pinned": 1, "unreachable": 39}


async def test_a_slow_table_is_waited_for_no_longer_than_that(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_agentserve.cluster.chooser.ASK_S", 0.01)
    near = Near(clock)
    near.slow_s = 30.0
    assert await Chooser(near, clock=clock).choose(Caller("s"), 100, LOADS) == rendezvous("s", LOADS)


async def test_what_is_known_stays_known_while_the_table_is_gone(clock: Clock) -> None:
    near = Near(clock)
    chooser = Chooser(near, clock=clock)
    known = [await chooser.choose(Caller(f"{number}"), 100, LOADS) for number in range(9)]
    near.up = False
    assert [await chooser.choose(Caller(f"{number}"), 100, LOADS) for number in range(9)] == known


async def test_an_ingress_remembers_so_many_conversations(clock: Clock) -> None:
    near = Near(clock)
    chooser = Chooser(near, max_known=2, clock=clock)
    for session in ("s", "t", "u", "s"):
        await chooser.choose(Caller(session), 100, LOADS)
    assert near.asked == 4


def test_tokens_that_live_on_engines_are_counted(clock: Clock) -> None:
    table = PinTable(ClusterSettings("model").mapping(), clock)
    engine, _ = table.place("s", 100, None, LOADS)
    table.finished("s", engine, 150, last=False)
    assert table.shown()["resident_tokens"] == {name: 150 if name == engine else 0 for name in LOADS}
    table.place("s", 200, None, LOADS)
    table.finished("s", engine, 250, last=True)
    assert sum(table.shown()["resident_tokens"].values()) == 0
    assert table.shown()["pins"] == 0


async def test_clients_that_send_a_new_name_with_every_call_grow_no_table(clock: Clock) -> None:
    near = Near(clock, max_pins=50)
    chooser = Chooser(near, max_known=40, clock=clock)
    for number in range(500):
        caller = Caller(f"{number}" * 60, parent=f"parent {number}")
        await chooser.choose(caller, 100, LOADS)
        near.table.finished(caller.session, "a", 100, last=False)
        near.table.turn(f"turn {number}", 100, "a")
    assert near.table.shown()["pins"] <= 50
    assert len(chooser._known) <= 40
    assert set(near.table.shown()["engine_pins"]) == set(LOADS)


def test_engines_that_have_ended_are_forgotten_at_last(clock: Clock) -> None:
    table = PinTable(ClusterSettings("model").mapping(), clock)
    for number in range(3 * MOST_GONE):
        table.place("s", 100, None, {f"{number}": None}, (f"{number - 1}",))
    assert len(table._gone) == MOST_GONE
    assert table.shown()["engine_moves"] == {f"{3 * MOST_GONE - 1}": 1}


def test_the_first_reason_of_those_that_did_not_start_is_kept_for_a_time(clock: Clock) -> None:
    table = PinTable(ClusterSettings("model").mapping(), clock)
    table.failed("of an earlier start")
    clock.now += 100
    assert table.first_failure(50) == ""
    for number in range(5):
        table.failed(f"reason {number}" + "x" * 10_000)
    assert table.first_failure(50).startswith("reason 0x")
    assert len(table.first_failure(50)) == 4000
    for number in range(1000):
        table.failed(f"{number}")
    assert table.first_failure(50) == "984"


def test_a_table_that_has_just_begun_knows_no_engines(clock: Clock) -> None:
    table = PinTable(ClusterSettings("model").mapping(), clock)
    table.turn("s", 100, "a")
    table.finished("s", "a", 100, last=False)
    with pytest.raises(LookupError):
        table.place("s", 100, None, {})
    assert table.place("s", 100, None, {"a": None}) == ("a", "first")


async def test_conversations_that_an_ingress_knows_outlive_a_table_that_starts_again(clock: Clock) -> None:
    """It learns from their next turns where they live. Neither time nor another ingress moves them then."""
    near = Near(clock)
    one, other = Chooser(near, clock=clock), Chooser(near, clock=clock)
    names = [f"{number}" for number in range(30)]
    places = {name: await one.choose(Caller(name), 100, LOADS) for name in names}
    near.start_again()
    await other.choose(Caller("somebody else"), 5000, LOADS)
    assert {name: await one.choose(Caller(name), 100, LOADS) for name in names} == places
    assert {name: await other.choose(Caller(name), 100, LOADS) for name in names} == places
    clock.now = KNOWN_S
    assert {name: await one.choose(Caller(name), 100, LOADS) for name in names} == places


async def test_a_conversation_that_goes_on_after_its_last_call_stays_where_its_context_is(clock: Clock) -> None:
    near = Near(clock)
    chooser = Chooser(near, clock=clock)
    engine = await chooser.choose(Caller("s"), 100, LOADS)
    near.table.finished("s", engine, 150, last=True)
    near.table.place("large", 5000, None, {engine: Report(2, EngineLoad(9, 9, 9000, 10_000))})
    assert await chooser.choose(Caller("s"), 200, LOADS) == engine
    clock.now = KNOWN_S
    assert await chooser.choose(Caller("s"), 200, LOADS) == engine


async def test_a_turn_to_an_engine_that_is_gone_pins_nothing_to_it(clock: Clock) -> None:
    """One ingress has found out that it is, the other one has not yet."""
    near = Near(clock)
    one, other = Chooser(near, clock=clock), Chooser(near, clock=clock)
    engine = await one.choose(Caller("s"), 100, LOADS)
    await other.choose(Caller("t"), 100, LOADS, avoid=(engine,))
    near.table.finished("s", engine, 100, last=True)
    assert await one.choose(Caller("s"), 100, LOADS) == engine
    assert near.table.place("s", 100, None, LOADS)[0] != engine


def test_engines_that_no_ingress_reaches_any_more_get_no_calls(clock: Clock) -> None:
    """The table outlives a deployment whose engines and ingresses have all ended: nobody says that its engines have."""
    table = PinTable(ClusterSettings("model").mapping(), clock)
    for number in range(6):
        table.place(f"before {number}", 100, None, {"a": None, "b": None})
    clock.now = UNREACHED_S + 1
    now: Reports = {"c": None, "d": None}
    names = [*(f"before {number}" for number in range(6)), *(f"after {number}" for number in range(20))]
    assert {table.place(name, 100, None, now)[0] for name in names} == {"c", "d"}
    assert set(table.shown()["resident_tokens"]) == {"c", "d"}


def test_an_engine_that_one_ingress_reaches_late_keeps_its_conversations(clock: Clock) -> None:
    table = PinTable(ClusterSettings("model").mapping(), clock)
    engine, _ = table.place("s", 100, None, {"a": None, "b": None})
    left: Reports = {name: None for name in "ab" if name != engine}
    clock.now = UNREACHED_S / 2
    table.place("t", 100, None, left)
    assert table.place("s", 100, None, {"a": None, "b": None}) == (engine, "pinned")
    clock.now = 10 * UNREACHED_S
    table.place("t", 100, None, left)
    table.turn("s", 100, engine)
    assert table.place("u", 100, None, {"a": None, "b": None})[0] in ("a", "b")
    assert set(table.shown()["resident_tokens"]) == {"a", "b"}


def test_the_name_of_an_engine_that_is_gone_does_not_come_back(clock: Clock) -> None:
    """An ingress that hears of it late does not bring it back."""
    table = PinTable(ClusterSettings("model").mapping(), clock)
    table.place("s", 100, None, {"a": None, "b": None})
    table.place("t", 100, None, {"b": None}, gone=("a",))
    assert {table.place(f"{number}", 100, None, {"a": None, "b": None})[0] for number in range(9)} == {"b"}


def test_a_report_counts_once_however_many_calls_bring_it(clock: Clock) -> None:
    """Between two reports the table goes by the calls that it has placed itself."""
    table = PinTable(ClusterSettings("model", policy="least-loaded").mapping(), clock)
    placed = [table.place("", 100, None, LOADS)[0] for _ in range(12)]
    assert sorted(placed.count(name) for name in LOADS) == [4, 4, 4]
    busy = LOADS | {"a": Report(2, EngineLoad(50, 0, 0, 10_000))}
    placed = [table.place("", 100, None, busy)[0] for _ in range(10)]
    assert "a" not in placed
    old = [table.place("", 100, None, LOADS)[0] for _ in range(10)]
    assert "a" not in old


def test_engines_that_are_gone_are_not_remembered_for_ever(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster whose engines start again and again: nobody names the old ones after a while."""
    made = PinTable(ClusterSettings("model").mapping(), clock)
    for number in range(2000):
        clock.now += 1.0
        made.place("s", 100, None, {"a": None}, gone=(f"engine {number}",))
    assert len(made._gone) <= NAMED_S + 1
    monkeypatch.setattr(table, "MOST_GONE", 10)
    made.place("s", 100, None, {"a": None}, gone=tuple(f"engine {number}" for number in range(2000, 2020)))
    assert list(made._gone) == [f"engine {number}" for number in range(2010, 2020)]


def test_an_engine_that_goes_on_reporting_is_used_again(clock: Clock) -> None:
    """It refused for a moment. One that has ended makes no reports, whatever its last one was."""
    made = PinTable(ClusterSettings("model").mapping(), clock)
    load = EngineLoad(0, 0, 0, 10_000)
    made.place("s", 100, None, {"a": None, "b": None})
    made.place("t", 100, None, {"b": None}, gone=("a",))
    for number in (7, 8, 8, *[8] * 50, *range(9, 17)):
        clock.now += 1.0
        assert made.place("", 100, None, {"a": Report(number, load), "b": None})[0] == "b"
    clock.now += 1.0
    placed = {made.place(f"new {again}", 100, None, {"a": Report(17, load), "b": None})[0] for again in range(4)}
    assert "a" in placed
    # Named again, it is gone again.
    made.place("u", 100, None, {"b": None}, gone=("a",))
    assert {made.place(f"late {again}", 100, None, {"a": Report(17, load), "b": None})[0] for again in range(4)} == {
        "b"
    }


def test_an_engine_that_is_gone_stays_so_while_an_ingress_still_names_it(clock: Clock) -> None:
    made = PinTable(ClusterSettings("model").mapping(), clock)
    made.place("s", 100, None, {"a": None, "b": None}, gone=("a",))
    for _ in range(5):
        clock.now += NAMED_S / 2
        assert made.place("s", 100, None, {"a": None, "b": None})[0] == "b"
    assert list(made._gone) == ["a"]


def test_the_page_of_metrics_looks_at_no_single_pin(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be 65,536, and calls wait to be placed meanwhile."""

    def walked(pins: Pins) -> Iterator[str]:
        raise AssertionError("all pins were looked at")

    made = PinTable(ClusterSettings("model").mapping(), clock)
    for number in range(50):
        made.place(f"{number}", 100, None, LOADS)
    monkeypatch.setattr(Pins, "__iter__", walked)
    shown = made.shown()
    assert sum(shown["engine_pins"].values()) == shown["pins"] == 50
