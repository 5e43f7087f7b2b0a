"""What programs under way will want of the KV cache."""

import pytest

from vllm_agentserve.policy.claims import AHEAD, Claims, Program, claim, lapsed, presence, stays
from vllm_agentserve.policy.gaps import Returns


def seen(back: int = 30, gone: int = 0, turn: int = 1, gap_s: float = 1.0) -> Returns:
    returns = Returns()
    for _ in range(back):
        returns.returned((True, turn), None, gap_s, revised=False)
    for _ in range(gone):
        returns.gone((True, turn), None)
    return returns


def test_turns_of_a_program() -> None:
    program = Program("p", True)
    assert program.turn() == (True, 1)
    program.turns = 1
    assert program.turn() == (True, 1)
    program.turns = 3
    assert program.turn() == (True, 3)
    program.turns = 1000
    assert program.turn() == (True, 48)
    assert Program("p", False).turn() == (False, 1)


def test_a_program_with_a_call_is_there() -> None:
    program = Program("p", True, calls={"a": 10}, turns=1)
    assert presence(program, Returns(), 1e9) == 1.0
    assert not lapsed(program, Returns(), 1e9)


def test_nobody_is_there_until_a_return_was_seen() -> None:
    program = Program("p", True, turns=1, ended_s=100.0)
    assert presence(program, Returns(), 100.1) == 0.0
    assert not lapsed(program, Returns(), 160.0)
    assert lapsed(program, Returns(), 160.1)


def test_a_claim_fades_while_its_program_is_away() -> None:
    program, returns = Program("p", True, turns=1, ended_s=100.0), seen(8, 2)
    back = returns.probability((True, 1), None)
    assert back < 0.8 < returns.probability((True, 2), None) + 0.1
    shares = [presence(program, returns, 100.0 + away) for away in (0.0, 0.5, 1.0, 3.0)]
    # Until enough were seen it comes back with 0.95.
    assert shares[0] == pytest.approx(0.95, abs=0.01)
    left = returns.longer(None, 1.0)
    assert shares[2] == pytest.approx(0.95 * left / (0.95 * left + 0.05))
    assert shares == sorted(shares, reverse=True)
    assert presence(program, returns, 130.0) == 0.0
    assert lapsed(program, returns, 130.0)
    assert not lapsed(program, returns, 101.0)


def test_claims_do_not_lapse_within_a_second_however_short_gaps_were() -> None:
    """A hundred tools took 50 ms; the next ones take half a second, of all programs at the same time."""
    returns = Returns()
    for _ in range(100):
        returns.returned((True, 1), None, 0.05, revised=False)
    program = Program("p", True, turns=1, ended_s=100.0)
    assert returns.longer(None, 0.9) < 0.03
    assert not lapsed(program, returns, 100.9)
    assert presence(program, returns, 100.9) > 0.6
    assert lapsed(program, returns, 101.0)
    assert presence(program, returns, 101.0) == 0.0


def test_a_turn_that_was_seen_often_is_believed() -> None:
    returns = Returns()
    for _ in range(60):
        returns.gone((True, 2), None)
        for _ in range(3):
            returns.returned((True, 1), None, 1.0, revised=False)
    assert returns.overall() > 0.6
    assert returns.seen((True, 2)) > 24
    assert presence(Program("p", True, turns=2, ended_s=0.0), returns, 0.0) < 0.05
    # A turn nobody reached is not.
    assert presence(Program("p", True, turns=3, ended_s=0.0), returns, 0.0) >= 0.8


def test_nobody_is_assumed_to_return_where_few_do() -> None:
    returns = Returns()
    for so in (True, False, False, True, False, False) * 3:
        if so:
            returns.returned((True, 1), None, 1.0, revised=False)
        else:
            returns.gone((True, 1), None)
    assert returns.overall() < 0.5
    there = presence(Program("p", True, turns=1, ended_s=0.0), returns, 0.0)
    assert there == pytest.approx(returns.probability((True, 1), None))


def test_what_a_tool_is_known_for_counts() -> None:
    returns = seen(40)
    for _ in range(3):
        returns.gone((True, 1), "submit")
    for _ in range(60):
        returns.returned((True, 1), None, 1.0, revised=False)
    submit = presence(Program("p", True, turns=1, ended_s=0.0, tool="submit"), returns, 0.0)
    assert submit == pytest.approx(returns.probability((True, 1), "submit"))
    assert submit < 0.7


def test_own_gaps_count() -> None:
    returns = seen(30)
    slow = Program("p", True, turns=9, ended_s=0.0)
    for _ in range(8):
        slow.own.add(60.0)
    assert not lapsed(slow, returns, 30.0)
    assert presence(slow, returns, 30.0) > 0.9
    assert lapsed(Program("p", True, turns=9, ended_s=0.0), returns, 30.0)


def test_programs_are_assumed_to_have_five_calls() -> None:
    """Sixteen programs were seen that ended after two calls: too few to believe it."""
    returns = seen(16)
    for _ in range(16):
        returns.gone((True, 2), None)
    found = dict(zip(AHEAD, stays(returns, True, 1), strict=True))
    assert found[0] == (1.0, 1.0)
    assert found[1] == (pytest.approx(1.0), 1.0)
    assert found[2] == (pytest.approx(1 / (returns.seen((True, 2)) + 1)), 1.0)
    assert found[4][1] == 1.0
    assert found[5][1] == pytest.approx(returns.at_most((True, 5)))
    late = dict(zip(AHEAD, stays(returns, True, 4), strict=True))
    assert late[1][1] == 1.0
    assert late[2][1] == pytest.approx(returns.at_most((True, 5)))


def test_enough_programs_are_believed() -> None:
    returns = seen(40)
    for _ in range(60):
        returns.gone((True, 2), None)
    assert returns.seen((True, 2)) > 24
    found = dict(zip(AHEAD, stays(returns, True, 1), strict=True))
    assert found[1][1] == pytest.approx(1.0, abs=0.05)
    assert found[2] == (pytest.approx(found[2][1]), pytest.approx(found[2][0]))
    assert found[2][1] < 0.06


def test_late_turns_are_one() -> None:
    returns = seen(30, turn=48)
    found = dict(zip(AHEAD, stays(returns, True, 60), strict=True))
    assert found[32] == (pytest.approx(1.0), pytest.approx(1.0))
    returns.gone((True, 48), None)
    share = returns.at_most((True, 48))
    assert dict(zip(AHEAD, stays(returns, True, 60), strict=True))[3][0] == pytest.approx(share**3)
    # Nobody was seen to come back after the calls 46 and 47: that they do is assumed, not learned.
    assert dict(zip(AHEAD, stays(returns, True, 46), strict=True))[4] == (
        0.0,
        pytest.approx(returns.at_most((True, 46)) * returns.at_most((True, 47)) * share**2),
    )
    for number in (46, 47):
        for _ in range(4):
            returns.returned((True, number), None, 1.0, revised=False)
    assert dict(zip(AHEAD, stays(returns, True, 46), strict=True))[2][0] == 0.0
    for number in (46, 47):
        returns.returned((True, number), None, 1.0, revised=False)
    assert dict(zip(AHEAD, stays(returns, True, 46), strict=True))[4][0] == pytest.approx(
        returns.at_most((True, 46)) * returns.at_most((True, 47)) * returns.at_most((True, 48)) ** 2
    )


def test_what_a_program_wants() -> None:
    learned = [(1.0 if turns < 3 else 0.1, 0.0) for turns in AHEAD]
    wanted = claim(1000, 100, learned)
    assert wanted.programs == 1.0
    assert wanted.ahead[:4] == (1000, 1100, 1200, pytest.approx(130))
    assert (wanted.now, wanted.most) == (1000, 1200)
    half = claim(1000, 100, learned, 0.5)
    assert (half.programs, half.most) == (0.5, 600)


def test_what_is_assumed_doubles_a_context_at_most() -> None:
    assumed = [(0.0, 1.0) for _ in AHEAD]
    assert claim(1000, 300, assumed).ahead[:6] == (1000, 1300, 1600, 1900, 2000, 2000)
    learned = [(1.0, 1.0) for _ in AHEAD]
    assert claim(1000, 300, learned).ahead[-1] == 1000 + 32 * 300


def test_what_is_guessed_is_less_than_what_is_assumed_at_most() -> None:
    """Whether a limit pays is decided for what is likely, who may begin for what may be."""
    unknown = claim(1000, 300, [(0.0, 1.0) for _ in AHEAD])
    assert unknown.guessed[:5] == (1000, 1300, 1600, 1600, 1600)
    assert (unknown.likely, unknown.most) == (1600, 2000)
    known = claim(1000, 300, [(1.0, 1.0) for _ in AHEAD])
    assert known.likely == known.most == 1000 + 32 * 300
    two = unknown + known
    assert two.guessed == tuple(one + other for one, other in zip(unknown.guessed, known.guessed, strict=True))
    assert two.likely == 1600 + 1000 + 32 * 300


def test_claims_are_added_up() -> None:
    nobody = Claims()
    assert (nobody.programs, nobody.now, nobody.most) == (0.0, 0.0, 0.0)
    one, other = claim(1000, 100, [(1.0, 1.0)] * 12), claim(500, 0, [(1.0, 0.0)] + [(0.0, 0.0)] * 11, 2.0)
    both = one + other
    assert both.programs == 3.0
    assert both.now == 2000
    assert both.most == 1000 + 3200
    assert (nobody + one) == one
