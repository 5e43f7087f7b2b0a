"""Sub-agents whose clients do not name the parent: who is thought to be one, and from what."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.load_server import BEGAN, Server, fill, learned
from vllm_agentserve.policy import known_programs, sub_agents
from vllm_agentserve.policy.claims import LoadCall, Program
from vllm_agentserve.policy.load import BEYOND
from vllm_agentserve.policy.sub_agents import SubAgents


class Clients:
    """Programs on a clock, and what is thought of them."""

    def __init__(self) -> None:
        self.known = SubAgents()
        self.now = 0.0
        self.programs: dict[str, Program] = {}

    def call(self, name: str) -> Program:
        """A call comes that runs for a second; the program's first, or it comes back."""
        if name in self.programs:
            program = self.programs[name]
            self.known.comes_back(program, self.now)
        else:
            program = self.programs[name] = Program(name, named=True)
            self.known.comes(program, self.now)
        program.calls[LoadCall(program, self.now, 100)] = None
        return program

    def end(self, name: str) -> None:
        program = self.programs[name]
        program.calls.clear()
        program.answered(self.now, 100, None, child=False)
        self.known.ended(program, self.now)

    def turn(self, name: str) -> None:
        self.call(name)
        self.now += 1.0
        self.end(name)

    def gone(self, name: str) -> None:
        self.known.gone(self.programs[name])

    def seems(self, name: str) -> bool:
        return self.known.seems(self.programs[name])

    def session(self, number: int, turns: int = 2, after_s: float = 0.01) -> None:
        """A parent that has a call, starts a sub-agent, waits for it, and comes back."""
        parent, child = f"parent-{number}", f"child-{number}"
        self.turn(parent)
        self.now += after_s
        for turn in range(turns):
            self.turn(child)
            self.now += 0.2 if turn < turns - 1 else 0.0
        self.now += 0.2
        self.turn(parent)
        self.gone(child)
        self.gone(parent)
        self.now += 10.0


def learn(clients: Clients, sessions: int = 8) -> Clients:
    for number in range(sessions):
        clients.session(number)
    return clients


@pytest.mark.parametrize(("sessions", "seems"), [(0, False), (2, False), (3, True), (20, True)])
def test_three_in_a_row_are_enough(sessions: int, seems: bool) -> None:
    clients = learn(Clients(), sessions)
    clients.turn("parent")
    clients.call("child")
    assert clients.seems("child") is seems


@pytest.mark.parametrize(("after_s", "seems"), [(0.0, True), (0.09, True), (0.11, False)])
def test_it_comes_right_after_a_call_of_its_parent(after_s: float, seems: bool) -> None:
    clients = learn(Clients())
    clients.turn("parent")
    clients.now += after_s
    clients.call("child")
    assert clients.seems("child") is seems


def test_it_seems_to_be_one_as_long_as_its_parent_is_silent() -> None:
    clients = learn(Clients())
    clients.turn("parent")
    clients.call("child")
    clients.now += 100.0
    assert clients.seems("child")
    clients.call("parent")
    assert not clients.seems("child")


def test_calls_of_others_that_end_at_the_same_time_may_have_been_the_parents() -> None:
    clients = learn(Clients())
    for name in ("one", "parent", "two"):
        clients.call(name)
    for name in ("one", "parent", "two"):
        clients.end(name)
    clients.call("child")
    clients.now += 0.5
    for name in ("one", "two"):
        clients.call(name)
        assert clients.seems("child")
    clients.call("parent")
    assert not clients.seems("child")


def test_a_program_with_another_call_waits_for_nobody() -> None:
    clients = learn(Clients())
    clients.turn("parent")
    clients.call("parent")
    clients.call("other")
    assert not clients.seems("other")


def test_nor_does_one_whose_client_says_that_it_is_over() -> None:
    clients = learn(Clients())
    clients.turn("last")
    clients.programs["last"].over = True
    clients.call("next")
    assert not clients.seems("next")


def chance(clients: Clients, number: int) -> None:
    """A program comes just when a call of another ends, which goes on while it is at work."""
    clients.turn(f"a-{number}")
    clients.call(f"b-{number}")
    clients.now += 0.5
    clients.call(f"a-{number}")


def in_its_gap(clients: Clients, number: int) -> None:
    """The same, but the other one comes back just when this one is away; it goes on later."""
    clients.turn(f"a-{number}")
    clients.turn(f"b-{number}")
    clients.now += 0.2
    clients.turn(f"b-{number}")
    clients.now += 0.2
    clients.call(f"a-{number}")
    clients.now += 1.0
    clients.call(f"b-{number}")


def closed_loop(clients: Clients, number: int) -> None:
    """A client begins the next session where one ends, and does not say so. Both are thought to be over in time."""
    names = [f"a-{number}", f"b-{number}"]
    for name in names:
        clients.turn(name)
    clients.now += 10.0
    for name in names if number % 2 else reversed(names):
        clients.gone(name)


def one_shot(clients: Clients, number: int) -> None:
    """A program of one call ends within the gap of another."""
    clients.turn(f"a-{number}")
    clients.turn(f"b-{number}")
    clients.now += 0.4
    clients.call(f"a-{number}")


def short_session(clients: Clients, number: int) -> None:
    """A program of several calls does."""
    clients.turn(f"a-{number}")
    clients.turn(f"b-{number}")
    clients.turn(f"b-{number}")
    clients.gone(f"b-{number}")
    clients.now += 2.1
    clients.call(f"a-{number}")


@pytest.mark.parametrize("happens", [chance, in_its_gap, closed_loop, one_shot, short_session])
def test_programs_that_come_by_chance_are_no_sub_agents(happens: Callable[[Clients, int], None]) -> None:
    clients = Clients()
    for number in range(40):
        happens(clients, number)
        clients.turn(f"probe-{number}")
        clients.call("new")
        assert not clients.seems("new")
        del clients.programs["new"]
        clients.known.forget("new")
        clients.now += 1.0


@pytest.mark.parametrize("happens", [chance, in_its_gap, closed_loop, one_shot, short_session])
def test_what_was_learned_is_unlearned(happens: Callable[[Clients, int], None]) -> None:
    clients = learn(Clients(), 40)
    for number in range(12):
        happens(clients, number)
        clients.now += 1.0
    clients.turn("probe")
    clients.call("new")
    assert not clients.seems("new")


def test_a_program_of_one_call_is_a_sub_agent_if_its_parent_comes_back_right_after_it() -> None:
    clients = Clients()
    for number in range(8):
        clients.session(number, turns=1)
    clients.turn("parent")
    clients.call("child")
    assert clients.seems("child")


def test_a_parent_that_was_thought_to_be_over_may_come_back() -> None:
    """It waits for longer than its tools ever took."""
    clients = Clients()
    for number in range(8):
        parent, child = f"parent-{number}", f"child-{number}"
        clients.turn(parent)
        clients.turn(child)
        clients.gone(parent)
        clients.now += 20.0
        clients.turn(child)
        clients.turn(parent)
        clients.now += 10.0
    clients.turn("parent")
    clients.call("child")
    assert clients.seems("child")


def test_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sub_agents, "PROGRAMS_KEPT", 3)
    clients = learn(Clients())
    for number in range(5):
        clients.now += 1.0
        clients.turn(f"parent-{number}+")
        clients.call(f"child-{number}+")
    assert list(clients.known._parents) == ["child-2+", "child-3+", "child-4+"]
    assert len(clients.known._children) == 3
    assert len(clients.known._believed) <= 3


def test_of_what_may_turn_out_to_be_none_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sub_agents, "PROGRAMS_KEPT", 3)
    clients = Clients()
    for number in range(5):
        clients.turn(f"parent-{number}")
        for _ in range(2):
            clients.turn(f"child-{number}")
        clients.turn(f"parent-{number}")
        clients.now += 1.0
    assert list(clients.known._believed) == ["child-2", "child-3", "child-4"]
    clients.gone("child-3")
    assert list(clients.known._believed) == ["child-2", "child-4"]


def test_those_that_are_forgotten_unknown_count_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = learn(Clients())
    monkeypatch.setattr(sub_agents, "PROGRAMS_KEPT", 1)
    share = clients.known._true.estimate(0.0, 1.0)
    for number in range(3):
        clients.now += 1.0
        clients.turn(f"one-{number}")
        clients.call(f"two-{number}")
    assert clients.known._true.estimate(0.0, 1.0) < share


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_where_both_are_gone_it_was_none(order: tuple[str, str]) -> None:
    clients = learn(Clients())
    share = clients.known._true.estimate(0.0, 1.0)
    clients.turn("one")
    clients.turn("two")
    clients.gone(order[0])
    assert clients.known._true.estimate(0.0, 1.0) == share
    assert list(clients.known._parents) == ["two"]
    clients.gone(order[1])
    assert clients.known._true.estimate(0.0, 1.0) < share
    assert not (clients.known._parents)
    assert not (clients.known._children)
    assert not (clients.known._gone)


@pytest.mark.parametrize("gone", ["one", "two"])
def test_what_is_forgotten_leaves_nothing_behind(gone: str) -> None:
    clients = learn(Clients())
    clients.turn("one")
    clients.turn("two")
    clients.gone(gone)
    assert clients.known._gone == {gone}
    clients.known.forget("two")
    assert not (clients.known._parents)
    assert not (clients.known._children)
    assert not (clients.known._gone)


def test_one_that_is_gone_may_be_parent_and_child() -> None:
    clients = learn(Clients())
    for name in ("one", "two", "three"):
        clients.turn(name)
    clients.gone("two")
    clients.known.forget("three")
    assert clients.known._gone == {"two"}
    assert list(clients.known._parents) == ["two"]
    clients.gone("one")
    assert not (clients.known._parents)
    assert not (clients.known._children)
    assert not (clients.known._gone)


def test_of_several_each_is_judged_by_itself() -> None:
    """The parent comes back while the first is still at work: that was none, the second was."""
    clients = Clients()
    for number in range(8):
        clients.turn(f"parent-{number}")
        clients.call(f"a-{number}")
        clients.turn(f"b-{number}")
        clients.turn(f"b-{number}")
        clients.call(f"parent-{number}")
        clients.now += 10.0
    known = clients.known._true
    assert known.estimate(0.0, 0.0) == pytest.approx(0.5, abs=0.05)
    assert known.samples == pytest.approx(13, abs=1.0)


def test_no_more_than_the_last_four_may_have_started_it() -> None:
    clients = learn(Clients())
    for number in range(5):
        clients.call(f"{number}")
    for number in range(5):
        clients.end(f"{number}")
    clients.call("child")
    for number in (4, 3, 2, 1):
        assert clients.seems("child")
        clients.call(f"{number}")
    assert not clients.seems("child")


def agree(known: SubAgents) -> bool:
    """Whether both ways round the same is remembered, and of those that are gone no others."""
    pairs = {(child, parent) for child, parents in known._parents.items() for parent in parents}
    other = {(child, parent) for parent, children in known._children.items() for child in children}
    empty = not all(known._parents.values()) or not all(known._children.values())
    return pairs == other and not empty and known._gone <= {name for pair in pairs for name in pair}


EVENTS = ["call", "end", "turn", "gone", "forget", "wait"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 3)), max_size=60))
def test_whatever_happens_both_ways_round_agree(events: list[tuple[str, int]]) -> None:
    clients = Clients()
    for event, number in events:
        name = f"{number}"
        program = clients.programs.get(name)
        busy = program is not None and bool(program.calls)
        if event in ("call", "turn") and not busy:
            clients.call(name)
            if event == "turn":
                clients.end(name)
        elif event == "end" and busy:
            clients.end(name)
        elif event == "gone" and program is not None and not busy:
            clients.gone(name)
        elif event == "forget" and program is not None and not busy:
            clients.known.forget(name)
            del clients.programs[name]
        elif event == "wait":
            clients.now += 0.04 * number
        assert agree(clients.known)


def with_sub_agents(server: Server, sessions: int = 8) -> None:
    """Parents that have a call, start a sub-agent of two calls under a name of its own, and come back."""
    for number in range(sessions):
        parent, child = f"old-parent-{number}", f"old-child-{number}"
        server.turn(f"{parent}/0", parent)
        server.now += 0.01
        server.turn(f"{child}/0", child)
        server.now += 1.0
        server.turn(f"{child}/1", child, 1150, 1050)
        server.now += 0.5
        server.turn(f"{parent}/1", parent, 1150, 1050, last=True)
        server.now += 50.0


def test_a_sub_agent_is_not_held_while_its_parent_waits() -> None:
    for taught in (False, True):
        server = learned()
        if taught:
            with_sub_agents(server)
        fill(server)
        server.now += 1.0
        server.end("new-0/0")
        server.now += 0.02
        before = server.load.report().begun.get("sub-agent", 0)
        server.arrive("child", "child")
        server.arrive("second", "child")
        assert server.may("child") is taught
        assert server.may("second") is taught
        assert server.load.report().begun.get("sub-agent", 0) == before + taught
        server.now += 1.0
        server.arrive("stray", "stray")
        assert not server.may("stray")
        assert server.faults() == []


def test_a_held_sub_agent_begins_once_it_is_thought_to_be_one() -> None:
    server = learned()
    with_sub_agents(server, 2)
    held = fill(server)
    server.now += 1.0
    server.end("new-0/0")
    server.arrive("child", "child")
    assert not server.may("child")
    server.load.programs.sub_agents._true.add(True)
    server.load.programs.sub_agents._true.add(True)
    assert server.may("child")
    assert not server.may(held[0])
    assert server.load.report().held == len(held)


def test_claims_of_sub_agents_are_counted_while_nobody_else_is_asked_for() -> None:
    """They are not added again and again to what was counted once."""
    server = learned()
    with_sub_agents(server)
    fill(server)
    for number in range(20):
        server.now += 1.0
        for index in range(BEGAN):
            if number:
                server.arrive(f"new-{index}/{number}", f"new-{index}")
                server.begin(f"new-{index}/{number}", 1000)
            server.end(f"new-{index}/{number}")
        server.arrive(f"child-{number}", f"child-{number}")
        assert server.may(f"child-{number}")
        server.begin(f"child-{number}")
        server.end(f"child-{number}", last=True)
    assert server.load.report().programs <= BEGAN + 3


def test_programs_that_look_like_sub_agents_go_beyond_the_limit_by_a_bounded_part() -> None:
    """A client of many programs, each of which comes when a call of another ends, does not fill the cache for all."""
    server = learned()
    with_sub_agents(server)
    fill(server)
    server.now += 1.0
    server.end("new-0/0")
    limit, begun, most = server.load.limit.tokens, 0, 0.0
    for number in range(100):
        server.now += 0.2
        server.arrive(f"new-0/{number + 1}", "new-0")
        server.begin(f"new-0/{number + 1}", 1000)
        server.end(f"new-0/{number + 1}")
        server.now += 0.01
        server.arrive(f"child-{number}", f"child-{number}")
        if server.may(f"child-{number}"):
            begun += 1
            most = max(most, server.load.report().claims_tokens)
            server.begin(f"child-{number}")
    assert begun > 0
    assert most <= (1 + BEYOND) * limit
    assert begun < 10
    assert server.faults() == []


def test_what_a_tenant_does_says_nothing_of_the_programs_of_others() -> None:
    """Neither are their programs taken for sub-agents, nor is that unlearned."""
    server = learned()
    for number in range(8):
        teach(server, "tenant a ", f"{number}")
    parent = turn_of(server, "tenant a ", "parent")
    server.now += 0.01
    ours = server.load.arrive("child", server.now, 1000, tenant="tenant a ")
    other = server.load.arrive("other", server.now, 1000, tenant="tenant b ")
    nobody = server.load.arrive("nobody", server.now, 1000)
    known = server.load.programs
    seem = [known.sub_agents_of(call.program).seems(call.program) for call in (ours, other, nobody)]
    assert seem == [True, False, False]
    assert parent.program.calls == {}


def test_calls_of_other_tenants_do_not_hide_who_may_have_started_a_program() -> None:
    server = learned()
    for number in range(8):
        teach(server, "tenant a ", f"{number}")
    turn_of(server, "tenant a ", "parent")
    for number in range(10):
        turn_of(server, "tenant b ", f"loud-{number}", seconds=0.001)
    child = server.load.arrive("child", server.now, 1000, tenant="tenant a ")
    assert server.load.programs.sub_agents_of(child.program).seems(child.program)


def test_tenants_that_are_invented_do_not_make_what_was_learned_of_others_forgotten() -> None:
    server = learned()
    for number in range(8):
        teach(server, "tenant a ", f"{number}")
    for number in range(3 * known_programs.TENANTS_KEPT):
        turn_of(server, f"tenant {number} ", f"{number}", seconds=0.001)
    assert len(server.load.programs._of_tenants) == known_programs.TENANTS_KEPT
    turn_of(server, "tenant a ", "parent")
    child = server.load.arrive("child", server.now, 1000, tenant="tenant a ")
    assert server.load.programs.sub_agents_of(child.program).seems(child.program)


def turn_of(server: Server, tenant: str, name: str, seconds: float = 1.0, last: bool = False) -> LoadCall:
    """A call of a tenant's program, from its arrival to its end."""
    call = server.load.arrive(f"{tenant}{name}", server.now, 1000, tenant=tenant)
    server.load.begin(call, server.now, 0)
    server.now += seconds
    server.load.end(call, server.now, 1050, read_s=0.2, read_tokens=1000, decode_s=0.3, last=last)
    return call


def teach(server: Server, tenant: str, name: str) -> None:
    """A parent of a tenant that starts a sub-agent, waits for it and comes back."""
    turn_of(server, tenant, f"parent {name}")
    server.now += 0.01
    turn_of(server, tenant, f"child {name}")
    turn_of(server, tenant, f"child {name}")
    server.now += 0.1
    turn_of(server, tenant, f"parent {name}", last=True)
    server.now += 50.0


def test_a_program_of_a_tenant_that_is_forgotten_is_so_among_those_of_its_tenant() -> None:
    server = learned()
    turn_of(server, "tenant a ", "one")
    server.now += 0.01
    turn_of(server, "tenant a ", "two")
    known = server.load.programs._of_tenants["tenant a "]
    assert known._parents == {"tenant a two": {"tenant a one"}}
    for name in ("one", "two"):
        server.load.forget(f"tenant a {name}")
    assert known._parents == {}
    assert known.learned


def test_asking_again_for_those_that_are_held_remembers_no_tenant() -> None:
    known = Server().load.programs
    program, _ = known.comes("p", 0.0, True, "tenant a ")
    assert not known.seems_sub_agent(program)
    assert known._of_tenants == {}


def test_of_those_that_look_like_sub_agents_and_want_too_much_not_all_are_weighed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client can make hundreds of them for each tenant that it invents. Smaller ones need not wait for larger ones."""
    server = learned()
    with_sub_agents(server)
    fill(server)
    server.now += 1.0
    server.end("new-0/0")
    server.now += 0.01
    for number in range(200):
        server.arrive(f"child-{number}", f"child-{number}", 3000 + number % 7)
    server.arrive("small", "small", 20)
    weighed, newcomer = [0], server.load.count.newcomer

    def counted(*given: Any) -> Any:
        weighed[0] += 1
        return newcomer(*given)

    monkeypatch.setattr(server.load.count, "newcomer", counted)
    began = [server.may(f"child-{number}") for number in range(200)]
    assert sum(began) <= 3
    assert server.may("small")
    assert weighed[0] <= 20
    server.now += 0.2
    assert not any(server.may(f"child-{number}") for number in range(200) if not began[number])
    assert weighed[0] <= 40
    assert server.faults() == []
