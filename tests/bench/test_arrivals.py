"""Steady traffic: moments of arrival, what is left out of the figures, and a queue that grows without end."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tests.support.token_server import token_server
from vllm_agentserve.bench.arrivals import (
    LEAD_SHARE,
    Arrivals,
    all_at_once,
    arrives,
    arriving,
    capacity_per_s,
    grows,
    lead_s,
    under_way,
)
from vllm_agentserve.bench.drawing import WorkloadOptions, draw_sessions
from vllm_agentserve.bench.measure import round_figures
from vllm_agentserve.bench.records import LEAD, Record, Results
from vllm_agentserve.bench.replay import Replay
from vllm_agentserve.bench.sessions import ONE_SHOT
from vllm_agentserve.bench.summary import steady_notes
from vllm_agentserve.bench.workloads import WORKLOADS


def drawn(workload: str = "react", agents: int = 40, sessions: int = 5, seed: int = 0) -> list:
    return draw_sessions(WORKLOADS[workload], WorkloadOptions(agents, sessions, scale=0.02), seed)


def record(session: str, begin_s: float, end_s: float, part: str = "measured", arm: str = "a") -> Record:
    return Record(
        arm=arm,
        round=0,
        part=part,
        session=session,
        agent=session,
        kind="agent",
        phase="cold",
        turn=0,
        prompt="",
        prompt_tokens=1,
        wanted_tokens=1,
        sent_us=int(begin_s * 1e6),
        ended_us=int(end_s * 1e6),
        stamps_us=[int(end_s * 1e6)],
    )


def test_sessions_arrive_at_random_and_wait_for_nobody() -> None:
    sessions = arriving(drawn(), 3, 2.0)
    starts = [session.start_s for session in sessions]
    gaps = [after - before for before, after in zip([0.0, *starts], starts, strict=False)]
    assert all(session.after is None for session in sessions)
    assert fmean(gaps) == pytest.approx(0.5, rel=0.2)
    assert max(gaps) > 3 * fmean(gaps)
    assert sum(gap < 0.25 for gap in gaps) == pytest.approx(0.39 * len(gaps), rel=0.25)


def test_moments_are_those_of_the_seed_whatever_is_drawn_and_at_whatever_rate() -> None:
    once, again = arriving(drawn(seed=1), 3, 2.0), arriving(drawn(seed=2), 3, 1.0)
    assert [one.turns for one in once] != [one.turns for one in again]
    assert [2 * one.start_s for one in once] == pytest.approx([one.start_s for one in again])
    assert [one.start_s for one in arriving(drawn(), 4, 2.0)] != [one.start_s for one in once]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_sub_agents_chats_and_batches_begin_as_before(workload: str) -> None:
    before = drawn(workload, 8, 1)
    sessions = arriving(before, 0, 1.0)
    assert [one.name for one in sessions] == [one.name for one in before]
    others = [(one, two) for one, two in zip(sessions, before, strict=True) if not arrives(one)]
    assert all((one.start_s, one.after) == (two.start_s, two.after) for one, two in others)
    leading = {one.name for one in sessions if one.lead and arrives(one)}
    assert len(leading) == round(LEAD_SHARE * sum(map(arrives, before)))
    spawned = {name for one in sessions if one.name in leading for turn in one.turns for name in turn.spawns}
    assert {one.name for one in sessions if one.lead} == leading | spawned


def test_the_lead_ends_when_the_first_session_arrives_that_counts() -> None:
    sessions = arriving(drawn(agents=5, sessions=2), 0, 1.0)
    assert [one.lead for one in sessions] == [True] * 2 + [False] * 8
    assert lead_s(sessions) == sessions[2].start_s
    assert {one.start_s for one in all_at_once(sessions)} == {0.0}


def test_the_rate_follows_from_the_capacity() -> None:
    assert Arrivals(0, per_s=0.3).rate(None) == 0.3
    assert Arrivals(0, load=0.7).rate(2.0) == pytest.approx(1.4)
    with pytest.raises(ValueError, match="a share of a capacity"):
        Arrivals(0, load=0.7).rate(None)


def test_a_queue_that_grows_without_end_is_told_from_one_that_does_not() -> None:
    steady = [record(f"s{n}", n, n + 5) for n in range(40)]
    behind = [record(f"s{n}", n, n + 5 + 0.8 * n) for n in range(40)]
    assert under_way(steady) == pytest.approx((5, 5), rel=0.1)
    early, late = under_way(behind) or (0.0, 0.0)
    assert late > 1.5 * early + 2
    assert grows([(early, late)] * 2 + [(5.0, 5.0)])
    assert not grows([(early, late), (5.0, 5.0)])
    assert not grows([])
    assert under_way(steady[:11]) is None


def test_single_calls_are_not_sessions_under_way() -> None:
    """Many come early: beside them a queue that grows would look as if it did not."""
    behind = [record(f"s{n}", n, n + 5 + 0.8 * n) for n in range(40)]
    single = [replace_kind(record(f"{ONE_SHOT}-{n}", 10 + n / 10, 40), ONE_SHOT) for n in range(96)]
    assert under_way([*behind, *single]) == under_way(behind)
    assert under_way(single) is None


def replace_kind(one: Record, kind: str) -> Record:
    one.kind = kind
    return one


def test_the_summary_names_the_arm_that_does_not_keep_up() -> None:
    from vllm_agentserve.bench.records import RoundRecord

    workload = {"load": "0.9", "sessions_per_s": "1", "capacity_per_s": "1.1", "capacity_of": "stock"}
    experiment = {"arms": [{"name": "stock"}, {"name": "ours"}], "workload": workload}
    rounds = [RoundRecord(arm=arm, round=0, began="") for arm in ("stock", "ours")]
    requests = [record(f"s{n}", n, n + 5 + 0.8 * n, LEAD if n < 8 else "measured", "stock") for n in range(40)]
    requests += [record(f"s{n}", n, n + 5, LEAD if n < 8 else "measured", "ours") for n in range(40)]
    first, *others = steady_notes(experiment, rounds, requests)
    assert "1 per second, 0.9 of the 1.1 that stock completes; the first 20% of them are in no figure" in first
    assert len(others) == 1
    assert others[0].startswith("stock does not keep up: ")
    assert steady_notes({**experiment, "workload": {}}, rounds, requests) == []


def test_prompts_of_the_lead_count_as_prompts_beside_others() -> None:
    own = record("s1", 1.0, 3.0)
    own.stamps_us = [1_500_000, 2_500_000]
    figures = round_figures(0, 1.0, [own], {}, None, [record("s0", 1.8, 2.0, LEAD)])
    assert [one.name for one in figures.sessions] == ["s1"]
    assert len(figures.sessions[0].gaps_cold) == 1
    assert len(round_figures(0, 1.0, [own], {}).sessions[0].gaps_cold) == 0
    assert figures.sessions[0].ttft.tolist() == [500.0]


def small_agents(agents: int, sessions: int, rounds: int) -> list[str]:
    """Arguments of `agentserve bench run` for agents of two short turns."""
    short = "--turns 2 --scale 0.02 --slo-factor 0"
    return f"--agents {agents} --sessions {sessions} --rounds {rounds} {short}".split()


@pytest.mark.slow
def test_a_load_is_measured_against_what_the_first_arm_completes(run, tmp_path: Path) -> None:
    small = small_agents(agents=8, sessions=2, rounds=2)
    with token_server("--interval-s", "0.004", "--first-s", "0.02") as one, token_server("--first-s", "0.02") as two:
        arms = ("--arms", "--url", f"stock={one}", "--url", f"other={two}")
        code, said = run("bench", "run", *small, *arms, "--load", "0.8", "--output", "r")
    assert code == 0, said
    results = Results(tmp_path / "r")
    workload = results.experiment()["workload"]
    assert float(workload["sessions_per_s"]) == pytest.approx(0.8 * float(workload["capacity_per_s"]), rel=0.01)
    assert (workload["load"], workload["capacity_of"]) == ("0.8", "stock")
    starts: dict[tuple[str, int], dict[str, int]] = {}
    for one_request in results.requests():
        assert one_request.part in ("measured", LEAD)
        if not one_request.turn:
            starts.setdefault((one_request.arm, one_request.round), {})[one_request.session] = one_request.sent_us
    moments = list(starts.values())
    assert len(moments) == 4
    for other in moments[1:]:
        assert all(abs(other[name] - at_us) < 150_000 for name, at_us in moments[0].items())
    assert {one.part for one in results.requests()} == {"measured", LEAD}
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert any("Sessions arrive at random" in note for note in summary["notes"])
    assert {"ttft_mean_ms", "ttft_p95_ms", "ttft_resume_p95_ms", "tpot_p95_ms"} <= set(
        summary["arms"]["other"]["figures"]
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--load", "0.5", "--sessions-per-s", "1"), "--load and --sessions-per-s both say how fast"),
        (("--workload", "programs", "--sessions-per-s", "1"), "means nothing to workload 'programs': .*use --load"),
        (("--trace", "sample", "--load", "0.5"), "--load 0.5 means nothing to a trace"),
    ],
)
def test_options_that_mean_nothing_together(run, given: tuple[str, ...], words: str) -> None:
    import re

    code, said = run("bench", "run", *given, "--arms", "--url", "a=http://127.0.0.1:1")
    assert code == 2
    assert re.search(words, " ".join(said.split()))


def test_sessions_that_failed_are_no_capacity() -> None:
    sessions = drawn(agents=4, sessions=1)
    records = [record(session.name, 0.0, 2.0) for session in sessions]
    assert capacity_per_s(sessions, records) == pytest.approx(2.0)
    for one in records[:3]:
        one.error, one.ended_us = "HTTP 503", 10_000
    assert capacity_per_s(sessions, records) == pytest.approx(0.5)
    records[3].error = "HTTP 503"
    assert capacity_per_s(sessions, records) is None
    assert capacity_per_s(sessions, []) is None


def test_chats_that_go_on_for_longer_are_not_waited_for() -> None:
    sessions = drawn("mixed", 4, 1)
    assert any(session.kind == "chat" for session in sessions)
    records = [record(session.name, 0.0, 60.0 if session.kind == "chat" else 2.0) for session in sessions]
    assert capacity_per_s(sessions, records) == pytest.approx(sum(map(arrives, sessions)) / 2.0)


def test_a_session_whose_sub_agent_failed_is_not_completed() -> None:
    (parent,) = drawn(agents=1, sessions=1)
    turns = (replace(parent.turns[0], spawns=("sub",)), *parent.turns[1:])
    sessions = [replace(parent, turns=turns), replace(parent, name="sub", forked=True)]
    records = [record(parent.name, 0.0, 4.0), record("sub", 1.0, 2.0)]
    assert capacity_per_s(sessions, records) == pytest.approx(0.25)
    assert capacity_per_s(sessions, records[:1]) is None
    records[1].error = "HTTP 503"
    assert capacity_per_s(sessions, records) is None


@pytest.mark.slow
def test_capacity_is_measured_with_the_clients_of_the_baseline(run, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    class Noted(Replay):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            given.append((arguments[4], self.anonymous))

    monkeypatch.setattr("vllm_agentserve.bench.experiment.Replay", Noted)
    small = small_agents(agents=4, sessions=1, rounds=1)
    with token_server("--first-s", "0.02") as one:
        arms = ("--arms", "--url", f"stock={one}", "--anonymous")
        code, said = run("bench", "run", *small, *arms, "--load", "0.8", "--output", "r")
    assert code == 0, said
    assert {part for part, _ in given} == {"capacity", "warm-up", "measured"}
    assert all(anonymous for _, anonymous in given)
