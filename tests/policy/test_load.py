"""Which programs may begin."""

import tracemalloc
from math import exp, inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.load_server import BEGAN, Server, fill, learned
from vllm_agentserve.policy import claim_count, known_programs
from vllm_agentserve.policy.claims import LoadCall, Program, claim, presence, stays
from vllm_agentserve.policy.first_calls import QUEUED, WAIT_READS, WAIT_S
from vllm_agentserve.policy.load_limit import FIRST_ROOM
from vllm_agentserve.policy.turn_means import Mean
from vllm_agentserve.policy.turn_rate import TurnCost, hit_ratio, turns_per_second

FADE = exp(-1 / 32)


def test_a_mean_of_what_was_seen_lately() -> None:
    mean = Mean()
    assert mean.value == 0.0
    mean.add(2.0)
    mean.add(8.0, 3.0)
    assert mean.value == pytest.approx((2 * FADE + 24) / (FADE + 3))


def test_nobody_is_held_until_a_return_was_seen() -> None:
    server = Server()
    assert fill(server) == []
    report = server.load.report()
    assert report.begun == {"one-shot": 30}
    assert (report.held, report.limit_tokens, report.reason) == (0, None, "fits")


def test_one_return_is_enough() -> None:
    server = Server()
    server.turn("a/0", "a")
    server.now = 1.0
    server.turn("a/1", "a", 1200, 1000)
    assert len(fill(server)) > 10


def test_programs_begin_while_they_fit() -> None:
    """A program is assumed to have five calls and grow by 150 in each, to 1608 with half a block; there is room for 9500."""
    server = learned()
    held = fill(server)
    began = 30 - len(held)
    assert began == BEGAN
    report = server.load.report()
    assert report.held == len(held) == 25
    assert report.begun == {"one-shot": 1, "unlimited": 9, "alone": 1, "fits": 4}
    assert report.reason == "model"
    assert report.limit_tokens == pytest.approx(0.95 * 10_000)
    assert report.programs == BEGAN
    assert report.claims_tokens <= report.limit_tokens < report.claims_tokens * 6 / 5
    assert report.pool_tokens == 10_000
    assert report.room == FIRST_ROOM == 0.95
    # Ten first calls found nothing; resumed ones all but the 100 new tokens.
    assert report.hit_ratio > 0.85


@pytest.mark.parametrize("pool_tokens", [0, 1, 16])
def test_a_cache_that_holds_nothing_is_no_obstacle(pool_tokens: int) -> None:
    server = learned(pool_tokens=pool_tokens)
    server.now += 700.0
    fill(server)
    server.now += 700.0
    assert server.may("new-29/0")


def test_where_all_fits_nobody_is_held() -> None:
    server = learned(pool_tokens=100_000)
    assert fill(server) == []
    assert server.load.report().reason == "fits"
    assert server.load.report().limit_tokens is None


def test_long_gaps_make_a_limit_too_expensive() -> None:
    """Sixty seconds between turns: an engine that recomputes gives more turns than one whose programs fit."""
    server = Server()
    server.learn(gap_s=60.0)
    assert fill(server) == []
    assert server.load.report().reason == "faster without"
    server.faults()


@pytest.mark.parametrize(("share", "held"), [(1.0, 25), (0.1, 0)])
def test_a_limit_is_not_worth_it_where_calls_have_little_to_read_again(share: float, held: int) -> None:
    """Most calls are those of sub-agents with short contexts."""
    server = learned()
    server.load.turns.parts.add(share, 1000.0)
    assert len(fill(server)) == held
    assert server.load.report().reason == ("model" if held else "faster without")


def test_the_share_of_what_its_program_will_want_that_a_call_has() -> None:
    """Contexts grow from 1050 tokens by 150 a turn: a call that comes back has less than the last one will."""
    server = learned()
    load = server.load
    share, weight = load.turns.parts.value, load.turns.parts._weight
    assert 0.6 < share < 0.9
    server.arrive("child", "old-True-3", 100)
    program = load.programs.live["old-True-3"]
    most = claim(program.wants, 150, stays(load.returns, True, program.turns + 1)).most
    server.begin("child", 100)
    fade = exp(-1 / 32)
    assert load.turns.parts.value == pytest.approx((share * weight * fade + 100 / most) / (weight * fade + 1))


def test_a_returning_call_is_never_held() -> None:
    server = learned()
    held = fill(server)
    server.end("new-0/0")
    server.now += 0.05
    server.arrive("new-0/1", "new-0", 1200)
    assert not server.may(held[0])
    assert server.may("new-0/1")
    # Nor a second call beside the first, once that has begun.
    server.arrive("new-1/x", "new-1", 1200)
    assert server.may("new-1/x")


def test_calls_of_a_program_that_has_not_begun_go_with_its_first() -> None:
    server = learned()
    held = fill(server)
    program = held[0].split("/", maxsplit=1)[0]
    server.arrive("second", program)
    assert not server.may("second")
    server.begin("second")
    assert server.may(held[0])
    assert server.load.report().held == len(held) - 1


def test_a_program_that_was_gone_is_not_a_newcomer() -> None:
    server = learned()
    fill(server)
    for program in ("old-True-9", "old-True-3"):
        server.arrive(f"{program}/again", program)
        assert server.may(f"{program}/again")
    assert server.faults() == []


def test_children_of_a_program_under_way_are_never_held() -> None:
    server = learned()
    held = fill(server)
    # A sub-agent's calls are its parent's program's.
    server.arrive("child", "new-0")
    assert server.may("child")
    orphan_of = held[0].split("/", maxsplit=1)[0]
    server.arrive("orphan", orphan_of)
    assert not server.may("orphan")
    server.arrive("stray", "nobody")
    assert not server.may("stray")


def test_what_cannot_return_is_never_held() -> None:
    server = learned()
    fill(server)
    server.arrive("embedding", "embedding", can_return=False)
    assert server.may("embedding")
    # Unnamed programs were never seen to return.
    server.arrive("plain", "plain", named=False)
    assert server.may("plain")


def test_what_cannot_return_claims_nothing_and_teaches_nothing() -> None:
    """Such as calls for log-probabilities of the prompt, which do not read the prefix cache."""
    server = learned()
    held = fill(server)
    before = server.load.report()
    for index in range(30):
        server.arrive(f"scored-{index}", f"scored-{index}", can_return=False)
        assert server.may(f"scored-{index}")
        server.begin(f"scored-{index}")
        server.now += 0.01
        assert server.load.report(server.now).claims_tokens == before.claims_tokens
        server.end(f"scored-{index}")
    server.now += 0.2
    assert server.load.report(server.now).programs == before.programs
    share = server.load.returns.begins(True)
    server.now += 100.0
    assert not server.may(held[0])
    assert server.load.returns.begins(True) == share
    # Nor does its program begin with it.
    server.arrive("both/0", "both", can_return=False)
    server.arrive("both/1", "both")
    server.begin("both/0")
    server.end("both/0")
    assert not server.may("both/1")
    # One of a program that is under way is one of its calls.
    server.arrive("new-0/1", "new-0", can_return=False)
    server.begin("new-0/1")
    server.end("new-0/1")
    server.end("new-0/0")
    assert server.load.programs.live["new-0"].turns == 2
    assert server.faults() == []


def test_unnamed_programs_are_learned_too() -> None:
    server = Server()
    server.learn(named=False)
    assert len(fill(server, named=False)) == 25
    server.arrive("named", "named", named=True)
    assert server.may("named")


def test_nobody_is_held_for_longer_than_the_bound() -> None:
    server = learned(max_hold_s=20.0)
    held = fill(server)
    for _ in range(19):
        server.now += 1.0
        assert not any(server.may(call) for call in held)
    server.now += 1.0
    assert all(server.may(call) for call in held)
    assert server.load.report().begun["bound"] == len(held)


def test_the_end_of_a_program_lets_the_next_one_begin() -> None:
    server = learned()
    held = fill(server)
    assert server.load.closed(server.now)
    assert server.load.ask_again_s == server.now + 0.1
    server.end("new-0/0", last=True)
    assert not server.load.closed(server.now)
    assert server.may(held[0])
    server.begin(held[0])
    assert not server.may(held[1])


def test_a_program_counts_from_the_moment_it_may_begin() -> None:
    """A scheduler that asks when calls come, and schedules them later: six want 0.96 pools, the seventh is too many."""
    server = Server()
    server.read_s = 1.0
    server.learn()
    asked = []
    for index in range(10):
        server.arrive(f"{index}/0", f"{index}")
        asked.append(server.may(f"{index}/0"))
    assert asked == [True] * 6 + [False] * 4
    assert server.load.report().programs == 6
    server.begin("0/0")
    assert server.load.report().programs == 6


def test_programs_that_come_together_are_decided_on_together() -> None:
    """Seven want 1.05 pools, which is let through. But ten came within a fifth of a second, and there is a limit for ten."""
    server = Server(pool_tokens=10_700)
    server.read_s = 1.0
    server.learn()
    for index in range(10):
        server.arrive(f"{index}/0", f"{index}")
        assert server.may(f"{index}/0") is (index < 6)
        server.now += 0.02
    for _ in range(4):
        server.now += 0.1
        assert not server.may("6/0")
    assert server.load.report().reason == "model"


@pytest.mark.parametrize("idle", [False, True])
def test_the_first_that_might_not_fit_waits_for_others_no_longer_than_a_moment(idle: bool) -> None:
    server = Server(pool_tokens=10_700)
    server.read_s = 1.0
    server.learn()
    for index in range(7):
        server.arrive(f"{index}/0", f"{index}")
        assert server.may(f"{index}/0", idle=idle and index == 6) is (index < 6 or idle)
    assert server.load.closed(server.now) is not idle
    server.now += 0.29
    assert server.may("6/0") is idle
    server.now += 0.02
    assert server.may("6/0")
    assert server.load.report().reason == "fits"


def unlimited(programs: int = 16) -> Server:
    """Tools take so long that no limit pays, and so many programs come at once that do not fit."""
    server = Server()
    server.learn(gap_s=5.0)
    for index in range(programs):
        server.arrive(f"{index}/0", f"{index}")
    return server


def test_whether_one_may_begin_that_might_not_fit_is_decided_when_the_engine_has_room_for_it() -> None:
    """Nobody is put out again, so a yes is not given to a call that would wait anyway."""
    server = unlimited()
    asked = [server.may(f"{index}/0") for index in range(16)]
    fit = sum(asked)
    assert asked == [True] * fit + [False] * (16 - fit)
    assert QUEUED <= fit < 10
    for index in range(fit - QUEUED):
        server.begin(f"{index}/0")
        assert not server.may(f"{fit}/0")
    # From now on one may begin for each that is scheduled.
    for index in range(fit, 16):
        assert not server.may(f"{index}/0")
        server.begin(f"{index - QUEUED}/0")
        assert not server.load.closed(server.now)
        assert server.may(f"{index}/0")
    assert server.load.report().held == 0
    assert server.faults() == []


def test_what_is_learned_meanwhile_counts() -> None:
    """Reading takes five times as long by then, so that a limit pays for those that were not let in at once."""
    server = unlimited()
    fit = [server.may(f"{index}/0") for index in range(16)].count(True)
    for _ in range(200):
        server.load.turns.read_s_per_token.add(1e-3, 1000)
    for index in range(fit):
        server.begin(f"{index}/0")
    server.now += 0.3
    assert not server.may(f"{fit}/0")
    assert server.load.report().reason == "model"


@pytest.mark.parametrize(("prompt", "waits_s"), [(1000, WAIT_S), (10_000, WAIT_READS * 2.0)])
def test_those_before_a_call_that_are_kept_by_something_else_do_not_keep_it(prompt: int, waits_s: float) -> None:
    """None of them was scheduled for a second, or for twice as long as its own prompt takes to read: 0.2 s per 1000 tokens."""
    server = unlimited()
    fit = [server.may(f"{index}/0") for index in range(16)].count(True)
    server.abort(f"{fit}/0")
    for index in range(fit + 1, 16):
        server.abort(f"{index}/0")
    server.arrive("late/0", "late", prompt)
    server.now += waits_s - 0.01
    assert not server.may("late/0")
    server.now += 0.12
    assert server.may("late/0")


@pytest.mark.parametrize(
    ("queued", "asked", "waits"),
    [
        ({}, {}, True),
        ({"batch": True}, {}, False),
        ({}, {"batch": True}, True),
        ({"batch": True}, {"batch": True}, True),
        ({}, {"ahead": True}, False),
        ({"ahead": True}, {}, True),
    ],
)
def test_only_calls_that_go_before_it_keep_another(
    queued: dict[str, bool], asked: dict[str, bool], waits: bool
) -> None:
    server = unlimited(0)
    server.arrive("one/0", "one", 4000)
    assert server.may("one/0", idle=True)
    server.begin("one/0")
    for index in range(QUEUED):
        server.arrive(f"{index}/0", f"{index}", **queued)
        assert server.may(f"{index}/0")
    server.arrive("another/0", "another", **asked)
    assert server.may("another/0") is not waits
    assert server.faults() == []


def test_those_that_wait_for_their_grammars_keep_nobody() -> None:
    """Otherwise a client with four of them would let others begin once a second, as long as nobody makes the grammars."""
    server = unlimited(0)
    server.arrive("one/0", "one", 4000)
    assert server.may("one/0", idle=True)
    server.begin("one/0")
    for index in range(QUEUED):
        server.arrive(f"slow-{index}/0", f"slow-{index}")
        assert server.may(f"slow-{index}/0")
        server.load.cannot_run(server.calls[f"slow-{index}/0"])
    server.now += 0.4
    for index in range(2 * QUEUED):
        server.arrive(f"{index}/0", f"{index}")
        assert server.may(f"{index}/0")
        server.begin(f"{index}/0")
    assert server.load.report().reason == "faster without"
    server.begin("slow-0/0")
    assert server.faults() == []


def test_those_that_give_up_keep_nobody() -> None:
    server = unlimited()
    fit = [server.may(f"{index}/0") for index in range(16)].count(True)
    for index in range(fit - QUEUED + 1):
        server.abort(f"{index}/0")
    assert server.may(f"{fit}/0")


def test_an_idle_engine_decides_at_once() -> None:
    server = unlimited()
    fit = [server.may(f"{index}/0") for index in range(16)].count(True)
    server.now += 0.2
    assert server.may(f"{fit}/0", idle=True)


def test_a_newcomer_does_not_pass_those_that_are_held() -> None:
    server = learned()
    held = fill(server)
    server.end("new-0/0", last=True)
    server.arrive("late", "late")
    assert not server.may("late")
    assert server.load.report().held == len(held) + 1
    assert not server.load.closed(server.now)
    # But a scheduler may ask for it first from then on.
    assert server.may("late")
    assert not server.may(held[0])


def test_one_client_with_a_huge_prompt_does_not_make_all_others_wait() -> None:
    server = learned(pool_tokens=20_000)
    held = fill(server)
    for call in held:
        server.abort(call)
    server.arrive("huge", "huge", 15_000)
    assert not server.may("huge")
    server.arrive("huge too", "huge too", 15_000)
    server.arrive("small", "small")
    server.end("new-0/0", last=True)
    # Larger ones keep their order, and small ones theirs.
    assert not server.may("huge too")
    assert server.may("small")
    server.arrive("next", "next")
    assert not server.may("next")
    server.arrive("last", "last", 100)
    assert not server.may("last")
    assert not server.may("huge")
    assert server.load.report().held == 4
    server.end("new-1/0", last=True)
    server.now += 0.2
    assert not server.load.closed(server.now)
    assert [server.may(call) for call in ("huge", "huge too", "next", "last")] == [False, False, True, True]
    server.abort("huge too")
    server.now += 600.0
    assert server.may("huge")
    assert (server.load.firsts.held, server.load.firsts.passed) == (0, 0)
    assert server.faults() == []


def test_asking_twice_counts_once() -> None:
    server = learned()
    fill(server, 1)
    server.arrive("one", "one")
    before = sum(server.load.report().begun.values())
    assert server.may("one")
    assert server.may("one")
    assert sum(server.load.report().begun.values()) == before + 1
    server.begin("one")
    server.begin("one")
    assert server.may("one")
    assert server.load.report().programs <= 2.0


def test_claims_lapse_when_programs_do_not_return() -> None:
    server = learned()
    held = fill(server)
    for index in range(BEGAN):
        server.end(f"new-{index}/0")
    server.now += 0.5
    assert not server.may(held[0])
    server.now += 30.0
    assert server.may(held[0])
    assert server.load.report().programs == 1.0
    assert server.load.report().begun["alone"] == 2
    assert server.faults(held) == []


def test_an_idle_engine_lets_somebody_begin_where_nobody_is_expected() -> None:
    """Gaps of one second and of thirty: who is not back after three will not be for long."""
    server = Server()
    server.read_s = 20.0
    server.learn(programs=20, gap_s=1.0, other_gap_s=30.0)
    held = fill(server)
    for index in range(30 - len(held)):
        server.end(f"new-{index}/0")
    server.now += 0.2
    assert not server.may(held[0], idle=True)
    server.now += 2.8
    assert not server.may(held[0], idle=False)
    server.now += 0.2
    assert server.may(held[0], idle=True)
    assert server.load.report().begun["idle"] == 1
    # A program with a call is expected: the engine is not idle for long.
    server.begin(held[0])
    server.now += 0.2
    assert not server.load.programs.nobody_returns(server.now)


def test_an_engine_that_stays_idle_lets_somebody_begin_although_others_are_expected() -> None:
    """Those under way may wait for the very calls that are held: sub-agents whose client does not name the parent."""
    server = Server()
    server.read_s = 5.0
    server.learn(20, other_gap_s=5.0)
    held = fill(server)
    for index in range(BEGAN):
        server.end(f"new-{index}/0")
    mean = server.load.returns.gaps.mean_s
    began = server.now
    while not server.may(held[0], idle=True):
        server.now += 0.05
    assert server.calls[held[0]].why == "idle"
    assert server.now - began <= 0.6 * mean + 0.2
    server.begin(held[0])
    assert not server.may(held[1], idle=True)


def test_a_parent_that_waits_for_a_held_child_ends_in_time() -> None:
    """Everybody under way waits for a held program that did not name its parent: their claims lapse, or the engine idles."""
    server = learned()
    held = fill(server)
    for index in range(BEGAN):
        server.end(f"new-{index}/0", tool="sub-agent")
    waited = 0.0
    while not server.may(held[0], idle=True):
        server.now += 0.5
        waited += 0.5
    assert waited <= 10.0


def long_ago(server: Server, programs: int) -> None:
    """So many programs are away, each for less than programs usually are."""
    for index in range(programs):
        name = f"away-{index}"
        server.arrive(name, name, 100)
        server.begin(name)
        server.end(name)


def looks(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the programs that are looked at; the last entry is that of the next question."""
    seen = [0]

    def counted(program: Program, *more: Any) -> float:
        seen[-1] += 1
        return presence(program, *more)

    for module in (claim_count, known_programs):
        monkeypatch.setattr(module, "presence", counted)
    return seen


def test_no_question_looks_at_more_than_so_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(pool_tokens=10_000_000)
    server.learn(gap_s=300.0)
    long_ago(server, 3000)
    seen = looks(server, monkeypatch)
    for index in range(200):
        seen.append(0)
        server.arrive(f"new-{index}", f"new-{index}", 100)
        server.may(f"new-{index}", idle=index % 2 == 0)
        server.now += 0.02
    assert 0 < max(seen) <= 512
    assert sum(seen) / 4.0 <= 1.1 / 1e-4
    assert server.load.report().programs == pytest.approx(3200, rel=0.1)


def test_an_idle_engine_counts_all_at_once_also_where_a_count_has_begun() -> None:
    """Its report is the last one: programs that have stayed away would be in it until it has work again."""
    server = Server(pool_tokens=10_000_000)
    server.learn(gap_s=2.0)
    long_ago(server, 2000)
    server.now += 1.0
    assert not server.load.count.counting
    assert server.load.report(server.now).programs > 1000
    assert server.load.count.counting
    server.now += 1000.0
    assert server.load.report(server.now, at_once=True).programs == 0
    assert not server.load.count.counting
    assert server.load.report(server.now, at_once=True).programs == 0


def test_a_program_that_begins_while_others_are_counted_counts_once() -> None:
    server = Server(pool_tokens=10_000_000)
    server.learn(gap_s=300.0)
    long_ago(server, 600)
    server.arrive("new", "new", 100)
    server.now += 1.0
    load = server.load
    load.count.update(server.now)
    assert load.count._round is not None
    server.begin("new")
    server.now += 0.06
    load.count.update(server.now)
    assert load.count._round is None
    counted = load.report().programs
    server.now += 1.0
    load.count.update(server.now)
    server.now += 0.06
    load.count.update(server.now)
    assert load.count._round is None
    assert counted == pytest.approx(load.report().programs, abs=0.5)


def test_calls_that_are_aborted_do_not_make_it_count_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(pool_tokens=10_000_000)
    server.learn(gap_s=300.0)
    long_ago(server, 500)
    seen = looks(server, monkeypatch)
    for index in range(200):
        server.arrive(f"new-{index}", f"new-{index}", 100)
        server.may(f"new-{index}")
        server.abort(f"new-{index}")
        server.now += 0.001
    assert sum(seen) <= 5 * 520


def test_aborted_calls_leave_nothing_behind() -> None:
    server = learned()
    held = fill(server)
    for call in held:
        server.abort(call)
    server.abort(held[0])
    assert server.load.report().held == 0
    for index in range(BEGAN):
        server.abort(f"new-{index}/0")
    assert not server.load.closed(server.now)
    server.arrive("next", "next")
    assert server.may("next")
    assert server.load.report().begun["alone"] == 2
    assert server.load.report().programs == 1.0
    assert server.faults(["next"]) == []


def test_a_client_that_times_out_and_tries_again_has_been_held_all_the_time() -> None:
    server = learned()
    held = fill(server)[0]
    name, came = held.removesuffix("/0"), server.now
    for attempt in range(9):
        server.now += 65.0
        server.abort(held)
        server.now += 1.0
        held = f"{name}/retry-{attempt}"
        server.arrive(held, name)
        assert not server.may(held)
        assert server.calls[held].came_s == came
    server.now = came + 600.0
    assert server.may(held)
    # Who comes again later begins to wait anew.
    server.arrive("late", "late")
    server.calls["late"].held, server.load.firsts.held = True, server.load.firsts.held + 1
    server.abort("late")
    server.now += 61.0
    server.arrive("later", "late")
    assert server.calls["later"].came_s == server.now
    assert server.load.programs._gave_up == {}


def test_an_aborted_turn_leaves_the_program_under_way() -> None:
    server = learned()
    held = fill(server)
    server.end("new-0/0")
    server.now += 1.0
    server.arrive("new-0/1", "new-0", 1200)
    server.begin("new-0/1")
    server.now += 5.0
    server.abort("new-0/1")
    server.now += 0.2
    assert not server.may(held[0])
    assert server.load.report().programs == pytest.approx(BEGAN, abs=0.3)


def test_forgotten_programs_have_no_claims() -> None:
    server = learned()
    held = fill(server)
    server.end("new-0/0")
    server.load.forget("new-0")
    server.load.forget("unknown")
    server.load.forget("new-1")
    assert server.may(held[0])
    assert server.faults() == []
    server.load.forget("old-True-3")
    server.arrive("old", "old-True-3")
    server.begin(held[0])
    assert not server.may("old")


def test_forks_are_calls_of_their_program() -> None:
    server = learned()
    held = fill(server)
    for fork in range(3):
        server.arrive(f"fork-{fork}", "new-0", 1100)
        assert server.may(f"fork-{fork}")
        server.begin(f"fork-{fork}", 1000)
    server.now += 0.2
    assert not server.may(held[0])
    assert server.load.report().programs == BEGAN
    for fork in range(3):
        server.end(f"fork-{fork}", last=True)
    # Its first call still runs.
    assert server.load.report().programs == BEGAN
    server.end("new-0/0", last=True)
    server.now += 0.2
    assert server.may(held[0])


def test_the_last_call_that_was_not_the_last() -> None:
    server = learned()
    fill(server)
    server.end("new-0/0", last=True)
    server.now += 1.0
    server.arrive("new-0/1", "new-0", 1200)
    assert server.may("new-0/1")
    server.begin("new-0/1", 1000)
    server.end("new-0/1", last=True)
    assert server.faults() == []


def test_ends_that_are_told_of_every_call_are_not_believed_for_long() -> None:
    server = Server()
    for program in range(3):
        for turn in range(4):
            server.turn(f"{program}/{turn}", f"liar-{program}", 1000 + 150 * turn, 1000, last=True)
            server.now += 1.0
    assert server.load.returns.begins(True) > 0.8
    held = fill(server)
    began = 30 - len(held)
    for index in range(began):
        server.end(f"new-{index}/0", last=True)
    server.now += 0.2
    # Their claims stand.
    server.may(held[0])
    assert server.load.report().programs == pytest.approx(began, abs=1.0)


def test_ends_are_believed_again_when_they_are_true() -> None:
    server = learned()
    load = server.load
    load.programs._untrue.add(1.0, 5.0)
    for call in fill(server):
        server.abort(call)
    for index in range(BEGAN):
        server.end(f"new-{index}/0", last=True)
    assert load.programs._untrue.value == pytest.approx(0.3, abs=0.1)
    server.learn(programs=40)
    assert load.programs._untrue.value < 0.15


def test_claims_of_those_that_are_away_and_of_those_that_run() -> None:
    server = learned()
    held = fill(server)
    for index in range(2):
        server.end(f"new-{index}/0")
    server.now += 0.2
    load = server.load
    assert load.report(server.now).held == len(held)
    there = presence(load.programs.live["new-0"], load.returns, server.now)
    away = claim(1050 + 150 + 8, 150, stays(load.returns, True, 2), 2 * there)
    running = claim(1000 + 8, 150, stays(load.returns, True, 1), BEGAN - 2)
    assert load.turns.growth.value == pytest.approx(150)
    assert load.count.claims.programs == pytest.approx(BEGAN - 2 + 2 * there)
    assert load.count.claims.ahead == pytest.approx((away + running).ahead)


@pytest.mark.parametrize("child", [False, True])
def test_a_context_that_was_compacted_is_claimed_no_longer(child: bool) -> None:
    """But a sub-agent's short context does not take the place of its parent's."""
    server = learned()
    server.turn("a/0", "a", 3950)
    program = server.load.programs.live["a"]
    assert (program.context, program.kept, program.wants) == (4000, 4000, 4000)
    for turn in range(10):
        server.arrive(f"a/{turn + 1}", "a", 350)
        server.begin(f"a/{turn + 1}", 300)
        server.end(f"a/{turn + 1}", child=child)
    assert program.kept == pytest.approx(4000 if child else 4000 * 0.9**10)
    for turn in range(20):
        server.arrive(f"b/{turn}", "a", 350)
        assert program.wants == max(program.kept, 350)
        server.begin(f"b/{turn}", 300)
        server.end(f"b/{turn}", child=child)
    assert program.kept == (4000 if child else 400)
    assert program.context == 4000


def test_room_follows_the_pressure_as_it_is() -> None:
    """Two contexts of 6000 on a pool of 10,000 of which 0.95 are of use: the model says that 0.56 of them are found."""
    server = Server()
    server.learn()
    server.load.limit.tokens = 1e4
    for name in ("a", "b"):
        server.arrive(f"{name}/0", name, 5850)
        server.begin(f"{name}/0")
        server.end(f"{name}/0", answer=0)
    server.now += 0.9
    server.arrive("a/1", "a", 5992)
    server.begin("a/1", 5850)
    assert server.load.report().room > 0.95
    load = server.load
    model = hit_ratio(load.count.claims.now / (10_000 * 0.95))
    assert 0.0 < model < 0.9
    assert load.report().room == pytest.approx(0.95 * exp(0.02 * (1 - model)))


def test_hits_are_shares_of_what_was_there() -> None:
    server = Server()
    server.turn("a/0", "a")
    server.now = 1.0
    server.arrive("a/1", "a", 1200)
    server.begin("a/1", 525)
    server.begin("a/1", 0)
    assert server.load.report().hit_ratio == pytest.approx(0.5)
    server.end("a/1")
    # An edited history: half of what was there.
    server.now = 2.0
    server.arrive("a/2", "a", 600)
    server.begin("a/2", 600)
    assert server.load.report().hit_ratio == pytest.approx((0.5 * FADE + 1) / (1 + FADE))


def test_tools_are_learned() -> None:
    server = Server()
    for index, tool in enumerate(["search", "search", "submit"]):
        server.arrive(f"{index}/0", f"{index}")
        server.begin(f"{index}/0")
        server.end(f"{index}/0", tool=tool)
    server.now = 2.0
    for index in range(2):
        server.arrive(f"{index}/1", f"{index}", 1200)
    server.now = 200.0
    server.arrive("late", "late")
    returns = server.load.returns
    assert returns.probability((True, 1), "search") > returns.probability((True, 1), None)
    assert returns.probability((True, 1), "submit") < returns.probability((True, 1), None)


def test_only_so_many_programs_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_agentserve.policy.known_programs.PROGRAMS_KEPT", 2)
    server = Server()
    for name in ("a", "b", "c"):
        server.turn(f"{name}/0", name, last=True)
    assert list(server.load.programs.gone) == ["b", "c"]


def test_when_calls_came_is_not_remembered_for_long() -> None:
    """Where programs do not come back, and while there is a limit, nobody asks how many came just now."""
    server = Server()
    for number in range(2000):
        server.now += 0.01
        server.arrive(f"{number}", f"one-shot {number}")
        assert server.may(f"{number}")
        server.begin(f"{number}")
        server.end(f"{number}")
    assert len(server.load.burst._came_s) <= 40


def test_a_program_that_is_remembered_is_small() -> None:
    """A client that sends a new session id with every call makes it remember 65 536 of them."""
    tracemalloc.start()
    try:
        programs = [Program(f"session {index}", named=True) for index in range(1000)]
        assert tracemalloc.get_traced_memory()[0] / len(programs) < 600
    finally:
        tracemalloc.stop()


def test_a_call_that_was_not_asked_for_is_no_obstacle() -> None:
    """It came first, and is no program under way."""
    server = Server()
    server.arrive("early", "early")
    server.learn(programs=20, other_gap_s=30.0)
    server.read_s = 20.0
    server.learn(programs=3, turns=1, named=False)
    held = fill(server, 8)
    for index in range(8 - len(held)):
        server.end(f"new-{index}/0")
    server.now += 0.2
    server.load.count.update(server.now)
    assert server.load.report().programs == pytest.approx(8 - len(held), abs=1.5)
    assert not server.load.programs.nobody_returns(server.now)


def test_measured_hits_correct_the_room() -> None:
    server = learned()
    held = fill(server)
    for index in range(BEGAN):
        server.end(f"new-{index}/0")
    server.now += 1.0
    for index in range(3):
        server.arrive(f"new-{index}/1", f"new-{index}", 1150)
        server.begin(f"new-{index}/1", 0)
    # All fit, and nothing was found: the model says 1.
    assert server.load.report().room == pytest.approx(0.95 * exp(-0.02 * 3))
    for index in range(3, BEGAN):
        server.arrive(f"new-{index}/1", f"new-{index}", 1150)
        server.begin(f"new-{index}/1", 1000)
    assert server.load.report().room == pytest.approx(0.95 * exp(-0.02 * 3))
    for turn in range(30):
        for index in range(BEGAN):
            server.end(f"new-{index}/{turn + 1}")
        server.now += 1.0
        for index in range(BEGAN):
            server.arrive(f"new-{index}/{turn + 2}", f"new-{index}", 1150)
            server.begin(f"new-{index}/{turn + 2}", 0)
    assert server.load.report().room == 0.85
    assert server.load.report().hit_ratio < 0.01
    assert not server.may(held[0])


@pytest.mark.parametrize(("cached", "room"), [(1056, 0.95), (528, 0.95 * exp(0.02 * (528 / 1550 - 1)))])
def test_part_of_a_block_is_never_found(cached: int, room: float) -> None:
    """Blocks of 528 tokens, as with hybrid models: of a context of 1550 tokens only 1056 can be found."""
    server = learned(pool_tokens=20_000, block_tokens=528)
    server.turn("a/0", "a", 1500)
    server.now += 0.9
    server.load.limit.tokens = 2e4
    server.load.begin(server.load.arrive("a", server.now, 1800), server.now, cached)
    assert server.load.report().room == pytest.approx(room)


def test_what_sub_agents_find_is_no_sign_of_pressure() -> None:
    """Their first prompts are new: nothing of them was ever there."""
    server = learned()
    fill(server)
    before = server.load.report()
    for number in range(20):
        server.now += 0.05
        server.arrive(f"child-{number}", "new-0", 800)
        server.load.begin(server.calls[f"child-{number}"], server.now, 0, child=True)
        server.end(f"child-{number}", child=True)
    report = server.load.report()
    assert (report.room, report.hit_ratio) == (before.room, before.hit_ratio)


def test_room_grows_where_more_is_found_than_fits() -> None:
    server = learned()
    fill(server)
    for index in range(BEGAN):
        server.end(f"new-{index}/0")
    for turn in range(1, 30):
        server.now += 1.0
        for index in range(BEGAN):
            # Contexts of 3000: twice the pool.
            server.arrive(f"new-{index}/{turn}", f"new-{index}", 3000)
            server.begin(f"new-{index}/{turn}", 3000)
        for index in range(BEGAN):
            server.end(f"new-{index}/{turn}")
    assert server.load.report().room == 1.15


def test_room_is_left_alone_where_there_is_no_limit() -> None:
    server = Server(pool_tokens=1_000_000)
    server.learn()
    fill(server)
    server.end("new-0/0")
    server.now += 1.0
    server.arrive("new-0/1", "new-0", 1200)
    server.begin("new-0/1", 0)
    assert server.load.report().room == FIRST_ROOM


def test_a_limit_needs_nearly_as_many_turns_to_come_and_goes_with_fewer() -> None:
    """Gaps grow, program by program, until a limit is too expensive; then they shrink until it comes again."""

    def limited(gap_s: float, before: bool) -> bool:
        server = Server()
        server.learn(gap_s=gap_s)
        if before:
            server.load.limit.tokens = 1e4
        return bool(fill(server))

    gaps = [0.5 * 1.1**step for step in range(30)]
    comes = max(gap for gap in gaps if limited(gap, False))
    stays = max(gap for gap in gaps if limited(gap, True))
    assert comes < stays

    def gain(gap_s: float) -> float:
        server = Server()
        server.learn(gap_s=gap_s)
        load = server.load
        footprint = load.count.newcomer(True, 1000).most
        context = footprint * load.turns.parts.value
        turn = TurnCost(load.returns.gaps.mean_s, 0.3, 100 * 0.0002, context * 0.0002)
        # The first of thirty was not held: nobody was under way.
        limited = turns_per_second(9_500 / footprint, turn, hit_ratio(1.0))
        return limited / turns_per_second(30, turn, 0.0, 9_500 / context)

    assert gain(comes) > 0.9 * 0.93
    assert gain(gaps[gaps.index(comes) + 1]) < 0.9 * 1.07
    assert gain(stays) > 0.8 * 0.93
    assert gain(gaps[gaps.index(stays) + 1]) < 0.8 * 1.07


def test_a_limit_goes_where_those_under_way_find_nothing_and_few_are_held() -> None:
    """Claims had lapsed too early, so that 17 of 18 began where five fit. To hold the last one until they end helps nobody; to
    hold forty more does, since they will have the cache for themselves."""
    for waiting, limited in ((1, False), (40, True)):
        server = learned()
        load = server.load
        for index in range(17 + waiting):
            server.arrive(f"new-{index}/0", f"new-{index}")
        for index in range(17):
            server.begin(f"new-{index}/0")
        last = f"new-{17 + waiting - 1}/0"
        server.now += 0.4
        assert load.report(server.now).claims_tokens > 1.6 * 10_000
        assert server.may(last) is not limited
        assert (load.report().limit_tokens is not None) is limited


def test_programs_that_end_without_saying_so_do_not_end_a_limit() -> None:
    """Those under way end together. For a while they might as well be using slower tools, for which no limit would pay; but who
    has begun cannot be stopped again, so only gaps that are over count."""
    server = Server()
    server.learn(gap_s=1.0)
    held = fill(server)
    began = range(30 - len(held))
    for index in began:
        server.end(f"new-{index}/0")
    for turn in range(1, 4):
        server.now += 1.0
        for index in began:
            server.turn(f"new-{index}/{turn}", f"new-{index}", 1000 + 150 * turn, 900)
    unlimited = server.load.report().begun["unlimited"]
    for _ in range(24):
        server.now += 0.25
        for name in [name for name in held if server.may(name)]:
            held.remove(name)
            server.begin(name)
        assert server.load.report().reason == "model"
        assert server.load.report(server.now).claims_tokens <= 9_500
    assert server.load.report().begun["unlimited"] == unlimited
    assert len(held) >= 20


def test_slower_tools_are_noticed_once_some_are_done() -> None:
    """Gaps were a tenth of a second, now they are thirty."""
    server = Server()
    server.learn(gap_s=0.1)
    held = fill(server)
    began = 30 - len(held)
    for index in range(began):
        server.end(f"new-{index}/0")
    server.now += 30.0
    for index in range(began):
        server.arrive(f"new-{index}/1", f"new-{index}")
        server.begin(f"new-{index}/1")
    server.now += 0.3
    for name in held:
        server.may(name)
    assert server.load.report().reason == "faster without"


def test_decisions_are_made_four_times_a_second() -> None:
    server = learned()
    held = fill(server)
    limit = server.load.report().limit_tokens
    server.load.room.pool_tokens = 8_000
    server.now += 0.2
    assert not server.may(held[0])
    assert server.load.report().limit_tokens == limit
    server.now += 0.11
    assert not server.may(held[0])
    assert server.load.report().limit_tokens == pytest.approx(0.95 * 8_000)


def test_half_a_block_of_every_context_is_wasted() -> None:
    fine, coarse = learned(), learned(block_tokens=1024)
    assert len(fill(coarse)) > len(fill(fine))


def test_faults_are_found() -> None:
    server = learned()
    held = fill(server)
    assert server.faults() == []
    assert server.faults(held) == [f"the program 'new-{index}' has 1 calls that are gone" for index in range(BEGAN)]
    load = server.load
    load.firsts.waiting[server.calls["new-1/0"]] = None
    load.firsts.held += 1
    server.calls["new-2/0"].over = True
    load.programs.live["new-3"].calls.clear()
    load.programs.gone["new-0"] = load.programs.live["new-0"]
    ghost = LoadCall(load.programs.live["new-4"], 0.0, 1, over=True)
    load.firsts.waiting[ghost] = None
    load.firsts.waiting[LoadCall(Program("new-0", True), 0.0, 1)] = None
    load.programs._away["new-4"] = None
    server.calls[held[0]].held = False
    assert server.faults() == [
        "the program 'new-2' has 1 calls that are gone",
        "the program 'new-3' has neither calls nor turns",
        "the program 'new-3' with 0 calls is not where such programs are",
        "the program 'new-4' with 1 calls is not where such programs are",
        "a first call of 'new-4' is gone",
        "a first call of 'new-0' is gone",
        "26 calls are said to be held, and 24 are",
        "the program 'new-0' is live and gone",
    ]


def test_chat_then_agents_then_chat() -> None:
    """How fast it adapts: seven returns in a row bring load control, three first calls without one end it."""
    server = Server(pool_tokens=6_000)
    server.read_s = 1.0
    for index in range(40):
        server.turn(f"chat-{index}", f"chat-{index}")
        server.now += 1.0
    server.now += 100.0
    assert fill(server, 8) == []
    returned = 0
    for index in range(8):
        server.end(f"new-{index}/0")
    server.now += 0.5
    while server.load.returns.begins(True) <= 0.6:
        index, turn = returned % 8, returned // 8 + 1
        server.arrive(f"new-{index}/{turn}", f"new-{index}", 1200)
        server.begin(f"new-{index}/{turn}", 1000)
        returned += 1
    assert returned == 7
    for index in range(20):
        server.arrive(f"more-{index}", f"more-{index}")
    assert not all([server.may(f"more-{index}") for index in range(20)])
    # Chat again: what has begun never comes back.
    for index in range(20):
        server.begin(f"more-{index}")
        server.end(f"more-{index}")
    server.now += 100.0
    server.arrive("last", "last")
    assert server.may("last")
    server.begin("last")
    server.now += 0.2
    server.arrive("chat", "chat")
    assert server.may("chat")
    assert server.load.returns.begins(True) < 0.6


EVENT = st.tuples(
    st.sampled_from(["arrive", "begin", "end", "last", "abort", "forget", "wait"]), st.integers(0, 7), st.booleans()
)


@settings(max_examples=60, deadline=None)
@given(st.lists(EVENT, max_size=120), st.floats(500, 20_000))
def test_whatever_happens_all_counters_agree_and_nobody_waits_for_ever(
    events: list[tuple[str, int, bool]], pool: float
) -> None:
    server = Server(pool_tokens=int(pool), max_hold_s=50.0)
    server.learn(programs=3)
    waiting: dict[str, float] = {}
    running: dict[str, str] = {}
    for number, (event, program, flag) in enumerate(events):
        server.now += 0.3
        if event == "arrive":
            call = f"{program}/{number}"
            server.arrive(call, f"p-{program}", 1000, named=flag)
            waiting[call] = server.now
        elif event == "begin":
            for call in list(waiting):
                if server.may(call, idle=not running):
                    server.begin(call, 500 if flag else 0)
                    running[call] = call
                    del waiting[call]
        elif event in ("end", "last") and running:
            call = sorted(running)[program % len(running)]
            server.end(call, last=event == "last", tool="t" if flag else None)
            del running[call]
        elif event == "abort" and (waiting or running):
            call = sorted([*waiting, *running])[program % (len(waiting) + len(running))]
            server.abort(call)
            waiting.pop(call, None)
            running.pop(call, None)
        elif event == "forget":
            server.load.forget(f"p-{program}")
        elif event == "wait":
            server.now += 3.0 * program
        assert server.faults([*waiting, *running]) == []
        report = server.load.report()
        assert report.held <= len(waiting)
        assert 0 <= report.claims_tokens < inf
    server.now += 50.0
    assert all(server.may(call) for call in waiting)
    for call in [*waiting, *running]:
        server.abort(call)
    server.now += 1e4
    server.arrive("end", "end")
    assert server.may("end")
    server.now += 0.2
    assert server.load.report(server.now).programs <= 1.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_an_idle_engine_never_waits_for_ever(seed: int) -> None:
    """Nobody under way ever comes back, nothing was told: the next one begins within a few usual gaps."""
    server = learned(pool_tokens=5_000 + 20 * seed)
    held = fill(server)
    for index in range(30 - len(held)):
        server.end(f"new-{index}/0")
    began = server.now
    for call in held:
        while not server.may(call, idle=True):
            server.now += 0.5
            assert server.now - began < 20.0 * len(held)
        server.begin(call)
        server.end(call)


def test_what_a_context_takes_in_one_go_is_what_it_takes_again() -> None:
    """Not what the short prompts of resumed calls take, each of which is part of a step."""
    server = Server()
    server.learn()
    assert server.load.turns.again_s_per_token == server.load.turns.read_s_per_token.value > 0
    call = server.load.arrive("other", server.now, 1000)
    server.load.begin(call, server.now, 0)
    server.load.end(call, server.now, 1100, read_s=0.2, read_tokens=1000, decode_s=0.3, whole_s=0.11)
    assert server.load.turns.again_s_per_token == pytest.approx(1e-4)


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_a_time_that_is_no_number_is_not_learned(strange: float) -> None:
    server = Server()
    server.learn()
    turns = server.load.turns
    before = turns.again_s_per_token, turns.decode_s.value, turns.read_s_per_token.value
    call = server.load.arrive("other", server.now, 1000)
    server.load.begin(call, server.now, 0)
    server.load.end(call, server.now, 1100, read_s=strange, read_tokens=1000, decode_s=strange, whole_s=strange)
    assert (turns.again_s_per_token, turns.decode_s.value, turns.read_s_per_token.value) == before
