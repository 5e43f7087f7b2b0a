"""What agents will do: drawn from a seed, or read from a trace; nothing here runs a server."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_agentserve.bench.drawing import WorkloadOptions, draw_sessions
from vllm_agentserve.bench.sessions import (
    CRITICAL,
    ONE_SHOT,
    TOKEN_IDS,
    Session,
    Turn,
    WorkloadError,
    alone_of,
    count_requests,
    longest_context,
    warm_up_of,
)
from vllm_agentserve.bench.trace import TraceOptions, read_trace, trace_path
from vllm_agentserve.bench.workloads import WORKLOADS, explain, find_workload


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_gives_the_same_sessions(name: str) -> None:
    shape = WorkloadOptions(agents=3, turns=4, scale=0.1)
    assert draw_sessions(WORKLOADS[name], shape, 7) == draw_sessions(WORKLOADS[name], shape, 7)
    assert draw_sessions(WORKLOADS[name], shape, 7) != draw_sessions(WORKLOADS[name], shape, 8)


@pytest.mark.parametrize("name", WORKLOADS)
def test_more_agents_leave_the_others_as_they_are(name: str) -> None:
    few = draw_sessions(WORKLOADS[name], WorkloadOptions(agents=2, scale=0.1), 1)
    more = draw_sessions(WORKLOADS[name], WorkloadOptions(agents=4, scale=0.1), 1)
    assert [one for one in few if one.kind == "agent"] == [
        one for one in more if one.agent.split(".")[0] in ("agent-1", "agent-2")
    ]


@pytest.mark.parametrize("name", ["react", "plan-execute", "coding"])
def test_scale_changes_lengths_and_nothing_else(name: str) -> None:
    whole, half = (draw_sessions(WORKLOADS[name], WorkloadOptions(scale=scale), 3) for scale in (1.0, 0.5))
    for one, other in zip(whole, half, strict=True):
        assert (one.name, one.start_s, len(one.turns)) == (other.name, other.start_s, len(other.turns))
        for a, b in zip(one.turns, other.turns, strict=True):
            assert a.tool_s == b.tool_s
            assert len(b.added) == pytest.approx(len(a.added) / 2, abs=1) or len(b.added) == 4


@pytest.mark.parametrize(
    ("name", "system", "result"), [("react", (2500, 3500), (30, 127)), ("plan-execute", (2500, 3500), (125, 421))]
)
def test_lengths_are_those_of_the_paper(name: str, system: tuple, result: tuple) -> None:
    for seed in range(5):
        for session in draw_sessions(WORKLOADS[name], WorkloadOptions(agents=6), seed):
            cold, *resumed = session.turns
            assert system[0] <= len(cold.added) <= system[1]
            assert all(result[0] <= len(turn.added) <= result[1] for turn in resumed)
            assert all(21 <= turn.answer <= 141 for turn in session.turns)
            assert all(TOKEN_IDS[0] <= token < TOKEN_IDS[1] for turn in session.turns for token in turn.added)


def test_coding_has_the_published_turns_and_a_heavy_tail() -> None:
    sessions = [
        one for seed in range(40) for one in draw_sessions(WORKLOADS["coding"], WorkloadOptions(scale=0.05), seed)
    ]
    turns = [len(one.turns) for one in sessions]
    assert sum(turns) / len(turns) == pytest.approx(11, abs=0.5)
    tools = sorted(turn.tool_s for one in sessions for turn in one.turns[1:])
    assert 0.5 < sum(tools) / len(tools) < 1.1  # cut off at 12 s
    assert tools[len(tools) // 2] < 0.4
    assert tools[-1] > 5


def test_shared_prompts_begin_alike_and_others_do_not() -> None:
    def heads(shared: float) -> set[tuple[int, ...]]:
        drawn = draw_sessions(WORKLOADS["react"], WorkloadOptions(shared=shared), 0)
        return {one.turns[0].added[:64] for one in drawn}

    assert len(heads(0.5)) == 1
    assert len(heads(0.0)) == 8


def test_sub_agents_fork_from_their_parent() -> None:
    drawn = [one for seed in range(10) for one in draw_sessions(WORKLOADS["field"], WorkloadOptions(scale=0.02), seed)]
    spawned = [name for one in drawn for turn in one.turns for name in turn.spawns]
    forks = [one for one in drawn if one.forked]
    assert sorted(one.name for one in forks) == sorted(spawned)
    assert forks
    assert all(one.phase(0) == "resume" for one in forks)
    parents = sum(any(turn.spawns for turn in one.turns) for one in drawn if not one.forked)
    assert 0.25 < parents / 40 < 0.65


def test_mixed_adds_chat_and_one_batch_job() -> None:
    kinds = [one.kind for one in draw_sessions(WORKLOADS["mixed"], WorkloadOptions(), 0)]
    assert (kinds.count("agent"), kinds.count("chat"), kinds.count("batch")) == (8, 2, 8)


def test_as_many_single_calls_as_calls_of_agents() -> None:
    drawn = draw_sessions(WORKLOADS["pressure-one-shot"], WorkloadOptions(), 0)
    single = [one for one in drawn if one.kind == ONE_SHOT]
    agents = [one for one in drawn if one.kind == "agent"]
    assert len(single) == sum(len(one.turns) for one in agents) == 96
    assert all(len(one.turns) == 1 and one.phase(0) == "cold" for one in single)
    starts = sorted(one.start_s for one in single)
    assert starts[0] < 1
    assert 19 < starts[-1] < 20


def test_every_fourth_agent_is_critical() -> None:
    drawn = draw_sessions(WORKLOADS["pressure-critical"], WorkloadOptions(agents=9), 0)
    assert [one.agent for one in drawn if one.kind == CRITICAL] == ["agent-4", "agent-8"]
    assert [one.kind for one in drawn].count("agent") == 7
    with_forks = replace(WORKLOADS["field"], critical=1)
    assert {one.kind for one in draw_sessions(with_forks, WorkloadOptions(scale=0.02), 1)} == {CRITICAL}
    assert "one of 4 agents is critical" in " ".join(explain(WORKLOADS["pressure-critical"]))


def test_the_isolated_run_has_the_same_lengths_and_other_tokens() -> None:
    sessions = draw_sessions(WORKLOADS["field"], WorkloadOptions(scale=0.02, turns=6), 4)
    alone = alone_of(sessions, "x")
    assert [one.name for one in alone] == [f"alone-{one.name}" for one in sessions]
    assert longest_context(alone) == longest_context(sessions)
    for before, one in zip([None, *alone], alone, strict=False):
        assert one.after == (None if before is None else before.name)
        assert not any(turn.tool_s for turn in one.turns)
    first = {one.turns[0].added[:16] for one in sessions}
    assert not first & {one.turns[0].added[:16] for one in alone}


def test_the_warm_up_is_short_and_shares_no_prompt() -> None:
    sessions = draw_sessions(WORKLOADS["react"], WorkloadOptions(), 0)
    short = warm_up_of(sessions, "0")
    assert (len(short), count_requests(short)) == (4, 8)
    # Who learns how long tools take has seen those of the workload, but nobody waits for long ones.
    by_name = {f"warm-up-{one.name}": one for one in sessions}
    assert [one.turns[1].tool_s for one in short] == [min(by_name[one.name].turns[1].tool_s, 5.0) for one in short]
    assert not {one.turns[0].added[:16] for one in short} & {one.turns[0].added[:16] for one in sessions}


def test_longest_context_follows_forks() -> None:
    sub = Session("sub", "sub", (Turn((1,) * 7, 3),), forked=True)
    parent = Session("a", "a", (Turn((1,) * 10, 5, spawns=("sub",)), Turn((1,), 1)))
    assert longest_context([parent, sub]) == 10 + 5 + 7 + 3


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (WorkloadOptions(scale=-1.0), "scale -1 must be above 0"),
        (WorkloadOptions(shared=2.0), "the shared part 2 from 0 to 1"),
    ],
)
def test_wrong_shapes(shape: WorkloadOptions, words: str) -> None:
    with pytest.raises(WorkloadError, match=words):
        draw_sessions(WORKLOADS["react"], shape, 0)


def test_an_unknown_workload_names_the_known_ones() -> None:
    with pytest.raises(
        WorkloadError, match="'reactt' is unknown: choose one of react, plan-execute, coding, field, mixed"
    ):
        find_workload("reactt")


def test_every_workload_explains_itself() -> None:
    for workload in WORKLOADS.values():
        assert workload.source in explain(workload)[-1]


# Traces


def trace(tmp_path: Path, *lines: dict | str) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_the_sample_trace_replays_both_ways() -> None:
    closed = read_trace(trace_path("sample"), TraceOptions(), 0)
    opened = read_trace(trace_path("sample"), TraceOptions(pace="open"), 0)
    assert len(closed) == 4
    assert count_requests(closed) == count_requests(opened) == len(opened) == 10
    assert all(len(one.turns) == 1 for one in opened)
    assert {one.phase(0) for one in opened} == {"cold", "resume"}


def test_equal_hash_ids_are_equal_tokens(tmp_path: Path) -> None:
    path = trace(
        tmp_path,
        {"timestamp": 0, "input_length": 1200, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 10, "input_length": 1500, "output_length": 5, "hash_ids": [1, 2, 9]},
    )
    first, second = (one.turns[0].context for one in read_trace(path, TraceOptions(), 0))
    assert (len(first), len(second)) == (1200, 1500)
    assert first[:1024] == second[:1024]
    assert first[1024:] != second[1024:1200]
    again = read_trace(path, TraceOptions(), 0)[0].turns[0].context
    assert again == first
    assert read_trace(path, TraceOptions(), 1)[0].turns[0].context != first


def test_scaled_blocks_share_the_same_part(tmp_path: Path) -> None:
    path = trace(
        tmp_path,
        {"input_length": 1024, "output_length": 100, "hash_ids": [1, 2]},
        {"input_length": 1024, "output_length": 100, "hash_ids": [1, 5]},
    )
    first, second = (one.turns[0] for one in read_trace(path, TraceOptions(scale=0.1), 0))
    assert (len(first.context), first.answer) == (102, 10)
    assert first.context[:51] == second.context[:51]
    assert first.context[51:] != second.context[51:]


def test_sessions_of_whole_prompts_and_of_added_ones(tmp_path: Path) -> None:
    whole = [
        {"session_id": "a", "timestamp": 0, "input_length": 600, "output_length": 9, "hash_ids": [1, 2]},
        {"session_id": "a", "delay": 250, "input_length": 700, "output_length": 9, "hash_ids": [1, 2]},
    ]
    session = read_trace(trace(tmp_path, *whole), TraceOptions(speed=2.0), 0)[0]
    assert [len(turn.context) for turn in session.turns] == [600, 700]
    assert session.turns[1].tool_s == pytest.approx(0.125)
    added = [{key: value for key, value in line.items() if key != "hash_ids"} for line in whole]
    session = read_trace(trace(tmp_path, *added), TraceOptions(), 0)[0]
    assert [(turn.context, len(turn.added)) for turn in session.turns] == [(None, 600), (None, 700)]
    session = read_trace(trace(tmp_path, *whole), TraceOptions(inputs="added"), 0)[0]
    assert [len(turn.added) for turn in session.turns] == [600, 700]


def test_sessions_start_at_their_timestamps(tmp_path: Path) -> None:
    path = trace(
        tmp_path,
        {"session_id": "a", "timestamp": 5000, "input_length": 10, "output_length": 1},
        {"timestamp": 7000, "input_length": 10, "output_length": 1},
    )
    assert [one.start_s for one in read_trace(path, TraceOptions(), 0)] == [0.0, 2.0]
    assert [one.start_s for one in read_trace(path, TraceOptions(pace="open", speed=4.0), 0)] == [0.0, 0.5]
    assert len(read_trace(path, TraceOptions(limit=1), 0)) == 1


GOOD = {"input_length": 10, "output_length": 1}


@pytest.mark.parametrize(
    ("lines", "reading", "words"),
    [
        (["{"], TraceOptions(), "line 1: not JSON"),
        ([GOOD, "3"], TraceOptions(), "line 2: not a JSON object"),
        ([{"output_length": 3}], TraceOptions(), "line 1: no 'input_length'"),
        ([{"text_input": "x"}], TraceOptions(), "holds 'text_input'; only traces with 'input_length'"),
        ([GOOD | {"input_length": 0}], TraceOptions(), "'input_length' = 0 is not allowed"),
        (
            [GOOD | {"input_length": 2.5}],
            TraceOptions(),
            "'input_length' = 2.5 is not allowed: it must be a whole number",
        ),
        ([GOOD | {"output_length": "9"}], TraceOptions(), "'output_length' = '9' is not allowed"),
        ([GOOD | {"delay": -1}], TraceOptions(), "'delay' = -1 is not allowed"),
        ([GOOD | {"hash_ids": ["a"]}], TraceOptions(), "'hash_ids' = \\['a'\\] is not allowed"),
        ([GOOD], TraceOptions(pace="open"), "line 1: no 'timestamp'.*replay it closed-loop"),
        ([], TraceOptions(), "holds no requests"),
    ],
)
def test_wrong_traces_name_line_and_field(tmp_path: Path, lines: list, reading: TraceOptions, words: str) -> None:
    with pytest.raises(WorkloadError, match=words):
        read_trace(trace(tmp_path, *lines), reading, 0)


def test_a_missing_trace() -> None:
    with pytest.raises(WorkloadError, match=r"trace nowhere\.jsonl cannot be read"):
        read_trace(Path("nowhere.jsonl"), TraceOptions(), 0)


def test_the_isolated_run_of_a_trace_has_other_tokens_and_shares_alike(tmp_path: Path) -> None:
    path = trace(
        tmp_path,
        {"session_id": "a", "input_length": 1100, "output_length": 9, "hash_ids": [1, 2, 3]},
        {"session_id": "a", "input_length": 1300, "output_length": 9, "hash_ids": [1, 2, 4]},
    )
    session = read_trace(path, TraceOptions(), 0)[0]
    first, second = (turn.context for turn in alone_of([session], "")[0].turns)
    assert first[:1024] == second[:1024]
    assert first[:64] != session.turns[0].context[:64]
    assert replace(session, name="b").phase(0) == "cold"
