"""Programs as traffic for servers: the simulator's calls as sessions, hints on the wire, figures of what was completed."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from tests.support.bench_records import BY_KEY, FORKING, record
from vllm_agentserve.bench.calls import CallShape, ProgramShape, ancestors, origin
from vllm_agentserve.bench.client import StreamingClient
from vllm_agentserve.bench.compare import compare
from vllm_agentserve.bench.cost import TOY_CPU, read_cost, write_cost
from vllm_agentserve.bench.measure import round_figures
from vllm_agentserve.bench.program_traffic import (
    PROGRAM_WORKLOADS,
    ProgramOptions,
    option_value,
    program_serve_options,
    sessions_of,
)
from vllm_agentserve.bench.records import Results
from vllm_agentserve.bench.replay import Replay
from vllm_agentserve.bench.sessions import ONE_SHOT, Session, Turn, WorkloadError, longest_context, warm_up_of

CHOSEN = ProgramOptions(number=12, load=0.9, scale=0.1, cost=TOY_CPU, slots=4, block=32)


@pytest.mark.parametrize("name", PROGRAM_WORKLOADS)
def test_a_seed_gives_the_same_sessions(name: str) -> None:
    workload = PROGRAM_WORKLOADS[name]
    assert CHOSEN.sessions(workload, 7) == CHOSEN.sessions(workload, 7)
    assert CHOSEN.sessions(workload, 7) != CHOSEN.sessions(workload, 8)


@pytest.mark.parametrize("name", PROGRAM_WORKLOADS)
def test_sessions_are_the_calls_of_the_simulator(name: str) -> None:
    """Every call is one turn, in its place, with its lengths and its tool; arrivals are the same."""
    for shape in CHOSEN.shapes(PROGRAM_WORKLOADS[name], 3):
        sessions = sessions_of(shape, 3)
        turns = {turn for session in sessions for turn in session.turns}
        assert len(turns) == len(shape.calls)
        root, *forked = sessions
        assert (root.name, root.start_s, root.forked) == (shape.name, shape.arrival_s, False)
        assert all(session.forked and session.name.startswith(f"{shape.name}.") for session in forked)
        assert {session.program for session in sessions} == {session.agent for session in sessions} == {shape.name}
        assert sorted(name for turn in turns for name in turn.spawns) == sorted(session.name for session in forked)
        lengths = sorted((len(turn.added), turn.answer, turn.tool_s) for turn in turns)
        assert lengths == sorted((call.uncached, call.output, call.tool_s) for call in shape.calls)
        assert longest_context(sessions) == max(call.context + call.uncached + call.output for call in shape.calls)


def test_a_search_forks_and_joins() -> None:
    calls = (
        CallShape(10, 0, 4),
        CallShape(5, 14, 3, 0.0, (0,)),
        CallShape(6, 14, 2, 0.0, (0,)),
        CallShape(7, 14, 1, 0.25, (1, 2)),
        CallShape(8, 22, 1, 0.0, (3,)),
    )
    root, first, second = sessions_of(ProgramShape("p", 1.5, calls), 0)
    assert (first.name, second.name) == ("p.1", "p.2")
    assert [(len(turn.added), turn.answer, turn.tool_s, turn.spawns) for turn in root.turns] == [
        (10, 4, 0.0, ("p.1", "p.2")),
        (7, 1, 0.25, ()),
        (8, 1, 0.0, ()),
    ]
    assert [origin(calls, index) for index in range(5)] == [None, 0, 0, 0, 3]


def test_a_program_with_two_beginnings_is_refused() -> None:
    with pytest.raises(WorkloadError, match="program 'p': call 1 has no parent, only the first one may"):
        sessions_of(ProgramShape("p", 0.0, (CallShape(4, 0, 1), CallShape(4, 0, 1))), 0)


def test_the_warm_up_of_programs_is_bounded() -> None:
    workload = PROGRAM_WORKLOADS["programs-chat"]
    many = ProgramOptions(number=40, load=0.9, scale=0.1, cost=TOY_CPU, slots=4, block=32).sessions(workload, 0)
    assert len(warm_up_of(many, "0")) == 16


# On the wire


class Listener:
    """A completions endpoint that keeps the bodies of all requests."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []

    async def completions(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        answer = web.StreamResponse()
        await answer.prepare(request)
        for token in range(self.bodies[-1]["max_tokens"]):
            event = {"choices": [{"text": "x", "token_ids": [500 + token]}]}
            await answer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        return answer


def replay(anonymous: bool, sessions: Sequence[Session] = FORKING) -> tuple[list[dict], Replay]:
    async def go() -> tuple[list[dict], Replay]:
        listener, app = Listener(), web.Application()
        app.add_routes([web.post("/v1/completions", listener.completions)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        try:
            async with StreamingClient(f"http://{host}:{port}") as client:
                running = Replay(client, sessions, anonymous=anonymous)
                await running.run()
        finally:
            await runner.cleanup()
        return listener.bodies, running

    return asyncio.run(go())


def test_forked_sessions_name_who_spawned_them() -> None:
    bodies, running = replay(anonymous=False)
    said = [(body["session_id"], body.get("vllm_xargs")) for body in bodies]
    hint = {"agent_parent": "p"}
    assert (said[0], said[-1]) == (("p", None), ("p", None))
    assert sorted(said[1:-1], key=str) == [("p.1", hint), ("p.1", hint), ("p.2", hint)]
    assert {one.program for one in running.records} == {"p"}


def test_anonymous_requests_say_nothing() -> None:
    bodies, running = replay(anonymous=True)
    assert len(bodies) == 5
    assert not any("session_id" in body or "vllm_xargs" in body for body in bodies)
    assert {one.session for one in running.records} == {"p", "p.1", "p.2"}


def test_single_calls_belong_to_no_session() -> None:
    single = Session("one-shot-1", ONE_SHOT, (Turn((7,) * 8, 2),), ONE_SHOT)
    bodies, running = replay(anonymous=False, sessions=[single, Session("a", "a", (Turn((8,) * 8, 2),))])
    assert sorted(body.get("session_id", "") for body in bodies) == ["", "a"]
    assert {one.session: one.kind for one in running.records} == {"one-shot-1": ONE_SHOT, "a": "agent"}


def test_servers_without_the_extensions_get_no_hint() -> None:
    body = msgspec.json.decode(StreamingClient("http://x", extensions=False).body([1], 1, "s", True, None, "p"))
    assert "vllm_xargs" not in body
    assert "session_id" not in body


# Figures


def program_record(session: str, program: str, sent: int, *stamps: int, **more):
    return record(session, sent=sent, stamps=stamps, program=program, agent=program, **more)


def test_a_program_is_a_session_and_what_forked_from_it() -> None:
    figures = round_figures(
        0,
        6.0,
        [
            program_record("p", "p", 0, 100, 200),
            program_record("p.1", "p", 200, 300, 400, 500),
            program_record("p.2", "p", 200, 1000),
            program_record("q", "q", 500, 600, 700),
            program_record("r", "r", 500, 600, error="gone"),
        ],
        {},
    )
    p, q, r = figures.programs
    assert (p.tokens, p.seconds, p.per_token_ms) == (6, 1.0, pytest.approx(1000 / 6))
    assert (q.tokens, q.per_token_ms) == (2, 100.0)
    assert r.per_token_ms is None
    assert figures.programs_per_min == 20.0
    assert BY_KEY["program_mean_ms"].of_programs(figures.programs) == pytest.approx((1000 / 6 + 100) / 2)
    assert BY_KEY["program_p95_ms"].of_programs(figures.programs) == pytest.approx(1000 / 6)
    assert BY_KEY["program_longest_s"].of_programs(figures.programs) == 1.0


def test_workloads_without_programs_have_no_such_figures() -> None:
    figures = round_figures(0, 1.0, [record("a", stamps=(10, 20))], {})
    assert figures.programs == []
    assert str(figures.programs_per_min) == "nan"
    assert compare(BY_KEY["program_mean_ms"], [figures], [figures]).as_json()["ratio"] is None


def test_programs_are_compared_in_pairs() -> None:
    def rounds(factor: int) -> list:
        return [
            round_figures(
                number,
                10.0,
                [program_record(f"p{n}", f"p{n}", 0, factor * (10 + n), factor * (20 + n + number)) for n in range(8)],
                {},
            )
            for number in range(3)
        ]

    found = compare(BY_KEY["program_mean_ms"], rounds(1), rounds(2))
    assert (found.ratio, found.verdict) == (pytest.approx(2.0), "worse")
    assert found.low <= found.ratio <= found.high


# The command line


@pytest.mark.slow
def test_programs_through_the_command(run, tmp_path: Path) -> None:
    from tests.support.token_server import token_server

    small = ("--workload", "programs", "--programs", "4", "--scale", "0.02", "--load", "5", "--slo-factor", "0")
    with token_server("--interval-s", "0.002", "--first-s", "0.002") as url:
        code, said = run("bench", "run", *small, "--url", url, "--rounds", "1", "--output", "r", "--anonymous")
    assert code == 0, said
    assert "program, time per generated token, mean (ms)" in said
    records = Results(tmp_path / "r").requests()
    assert {one.program for one in records} == {f"mixed-{n}" for n in range(4)}
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["experiment"]["workload"]["load"] == "5"
    assert summary["experiment"]["anonymous"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--programs", "5"),
            "--programs 5 means nothing to workload 'react': leave it out, or choose one of programs",
        ),
        (("--workload", "programs", "--agents", "3"), "--agents 3 means nothing to workload 'programs'"),
        (("--workload", "programs", "--turns", "3"), "leave it out, or use --programs"),
        (("--workload", "programs", "--load", "0"), "'0' must be a number from 0.01 to 10"),
        (("--workload", "programs", "--step-cost", "none.json"), "--step-cost none.json cannot be read"),
        (("--workload", "programs", "--serve", "--max-num-seqs x"), "--max-num-seqs 'x' is not allowed"),
        (("--trace", "sample", "--programs", "3"), "--programs 3 means nothing to a trace"),
        (
            ("--workload", "programms"),
            "choose one of react, plan-execute, coding, field, mixed, pressure, pressure-one-shot, pressure-critical, programs",
        ),
    ],
)
def test_wrong_arguments(run, arguments: tuple, words: str, toy_model: Path) -> None:
    code, said = run("bench", "run", *arguments)
    assert code == 2
    assert words in said


def test_the_last_option_counts() -> None:
    serve = ("--max-num-seqs", "32", "--max-num-seqs=8", "--dtype", "bfloat16", "--max-num-seqs", "4")
    assert option_value(serve, "--max-num-seqs", "1") == "4"
    assert option_value(serve, "--block-size", "16") == "16"


def test_a_cost_is_written_and_read(tmp_path: Path) -> None:
    write_cost(tmp_path / "cost.json", TOY_CPU)
    assert read_cost(tmp_path / "cost.json") == TOY_CPU


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "must hold an object with base, sequence, context, tokens, attended"),
        ('{"base": 1}', "must hold an object with base"),
        ('{"base": 0, "sequence": 1, "context": 1, "tokens": 1, "attended": 1}', "'base' = 0 is not allowed"),
        ('{"base": 1, "sequence": -1, "context": 1, "tokens": 1, "attended": 1}', "must be a number from 0"),
    ],
)
def test_wrong_costs(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "cost.json").write_text(text)
    with pytest.raises(WorkloadError, match=words.replace("(", "\\(")):
        read_cost(tmp_path / "cost.json")


# Programs of several agents


@pytest.mark.parametrize("name", ["code-writer", "deep-research"])
def test_agents_wait_for_their_sub_agents_and_go_on_from_their_own_context(name: str) -> None:
    workload = PROGRAM_WORKLOADS[name]
    assert workload.cpu_slots == int(program_serve_options(False, workload)[1]) == 32
    assert any("2510.18586" in line for line in workload.explain())
    options = ProgramOptions(number=24, load=0.9, scale=1.0, cost=TOY_CPU, slots=32, block=16)
    for shape in options.shapes(workload, 1):
        joins = [index for index, call in enumerate(shape.calls) if len(call.parents) > 1]
        assert joins
        for index in joins:
            before = origin(shape.calls, index)
            assert before is not None
            start = shape.calls[before]
            assert shape.calls[index].context == start.context + start.uncached + start.output
            assert all(before in ancestors(shape.calls, end) for end in shape.calls[index].parents)
        root, *threads = sessions_of(shape, 1)
        assert all(len(thread.turns) > 1 for thread in threads)
        assert any(turn.tool_s > 1.0 for thread in threads for turn in thread.turns)
        spawned = [turn.spawns for turn in root.turns if turn.spawns]
        assert len(spawned) == len(joins)


def test_a_code_writer_is_as_large_as_the_published_one() -> None:
    options = ProgramOptions(number=100, load=0.9, scale=1.0, cost=TOY_CPU, slots=32, block=16)
    shapes = options.shapes(PROGRAM_WORKLOADS["code-writer"], 0)
    calls = sum(len(shape.calls) for shape in shapes) / len(shapes)
    answers = sum(call.output for shape in shapes for call in shape.calls) / len(shapes)
    assert calls == pytest.approx(27, rel=0.15)
    assert answers == pytest.approx(6464, rel=0.25)


def test_contexts_of_researchers_grow() -> None:
    options = ProgramOptions(number=50, load=0.9, scale=1.0, cost=TOY_CPU, slots=32, block=16)
    shapes = options.shapes(PROGRAM_WORKLOADS["deep-research"], 0)
    longest = [max(call.context + call.uncached + call.output for call in shape.calls) for shape in shapes]
    assert sum(longest) / len(longest) > 8000
    assert max(longest) < 32_768


def test_threads_of_different_lengths_join_where_they_forked() -> None:
    calls = (
        CallShape(10, 0, 4),
        CallShape(5, 14, 3, 0.0, (0,)),
        CallShape(6, 22, 2, 0.5, (1,)),
        CallShape(7, 14, 1, 0.0, (0,)),
        CallShape(8, 14, 1, 0.0, (2, 3)),
        CallShape(5, 23, 1, 0.0, (4,)),
        CallShape(5, 23, 1, 0.0, (4,)),
        CallShape(5, 23, 1, 0.0, (5, 6)),
    )
    assert [origin(calls, index) for index in range(8)] == [None, 0, 1, 0, 0, 4, 4, 4]
    root, first, second, third, fourth = sessions_of(ProgramShape("p", 0.0, calls), 0)
    assert [len(one.turns) for one in (root, first, second, third, fourth)] == [3, 2, 1, 1, 1]
