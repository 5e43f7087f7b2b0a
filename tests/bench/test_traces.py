"""Recorded traffic in the dialects people have; the traces here are written for these tests."""

import asyncio
import gzip
import json
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from time import perf_counter

import msgspec
import pytest

from vllm_agentserve.bench.client import StreamError
from vllm_agentserve.bench.replay import PREPARE_AHEAD_S, Replay
from vllm_agentserve.bench.sessions import (
    Session,
    Turn,
    TurnKey,
    WorkloadError,
    alone_of,
    longest_context,
    salted,
    session_walk,
    warm_up_of,
)
from vllm_agentserve.bench.tokens import OWN_TOKENS, RecordedTokens
from vllm_agentserve.bench.trace import Trace, TraceOptions, read_trace

LINE = {"input_length": 10, "output_length": 1}


def written(folder: Path, *lines: dict, name: str = "trace.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def by_name(sessions: list[Session]) -> dict[str, Session]:
    return {session.name: session for session in sessions}


def waits(session: Session) -> list[tuple[TurnKey, ...]]:
    return [turn.waits for turn in session.turns]


# Memory


def many(count: int, blocks: int = 40) -> list[dict]:
    """Lines without anything in common, a second apart."""
    return [
        {
            "timestamp": 1000 * number,
            "input_length": 512 * blocks,
            "output_length": 2,
            "hash_ids": list(range(number * blocks, (number + 1) * blocks)),
        }
        for number in range(count)
    ]


def test_a_trace_that_is_read_takes_no_memory_for_its_tokens(tmp_path: Path) -> None:
    """Eight million tokens: as tuples of numbers 64 MB, and a second copy of them as a warm-up."""
    path = written(tmp_path, *many(400))
    tracemalloc.start()
    sessions = read_trace(path, TraceOptions(), 0)
    other = salted(sessions, "salt"), alone_of(sessions, "0"), warm_up_of(sessions, "0")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(len(one.turns[0].context) for one in sessions) == 400 * 40 * 512
    assert longest_context(other[0]) == 40 * 512 + 2
    assert len(other[2]) == 16
    # The warm-up's own tokens are 2.6 MB of it.
    assert peak < 24e6


class Slow:
    """A server that answers after a while; remembers the most bytes of prompts at once that the replay held."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.replay: Replay | None = None
        self.most = 0
        self.sent: dict[str, float] = OrderedDict()
        self.ended: dict[str, float] = {}
        self.parents: dict[str, str | None] = {}
        self.prompts: dict[str, list[int]] = {}
        self.priorities: dict[str, int | None] = {}

    async def generate(self, kind, prompt, max_tokens, session_id=None, into=None, due=None, parent=None, **more):
        name = f"{session_id}/{sum(one.rpartition('/')[0] == session_id for one in self.sent)}"
        into.sent = self.sent[name] = perf_counter()
        self.parents[session_id] = parent
        self.priorities[name] = more["priority"]
        self.prompts[name] = msgspec.json.decode(prompt)
        assert self.replay is not None
        self.most = max(self.most, sum(len(one._json) for one in self.replay._contexts.values()))
        await asyncio.sleep(0.02)
        into.finished = self.ended[name] = perf_counter()
        if session_id == self.fails:
            raise StreamError("refused")
        into.stamps = [perf_counter()] * max_tokens
        into.token_ids = [9] * max_tokens
        return into


def replayed(sessions: list[Session], fails: str = "", **more) -> Slow:
    server = Slow(fails)
    server.replay = Replay(server, sessions, **more)  # type: ignore[arg-type]
    asyncio.run(asyncio.wait_for(server.replay.run(), 30))
    return server


@pytest.mark.parametrize("more", [{}, {"live": 2}])
def test_a_replay_holds_the_prompts_that_are_in_flight(tmp_path: Path, more: dict) -> None:
    """Forty prompts, one every 50 ms after the preparation of a second: only those near their time are in memory."""
    path = written(tmp_path, *many(60, blocks=4))
    server = replayed(read_trace(path, TraceOptions(pace="open", speed=20), 0), **more)
    one = max(len(json.dumps(prompt, separators=(",", ":"))) for prompt in server.prompts.values())
    assert len(server.prompts) == 60
    assert server.most <= one * (PREPARE_AHEAD_S * 20 + 5 if not more else 3)
    assert server.replay is not None
    assert server.replay._contexts == {}


def test_contexts_are_let_go_when_a_session_is_over_and_nobody_forks_from_it() -> None:
    sessions = [
        Session("a", "a", (Turn((1,), 1, spawns=("b",)), Turn((2,), 1, spawns=("c", "d")))),
        *(Session(name, name, (Turn((3,), 1),), forked=True) for name in "bcd"),
        Session("e", "e", (Turn((1,), 1), Turn((2,), 1))),
    ]
    for fails in ("", "a", "b", "c", "e"):
        server = replayed(sessions, fails)
        assert server.replay is not None
        assert server.replay._contexts == {}, fails


def test_recorded_tokens_are_a_sequence_like_any_other() -> None:
    tokens = RecordedTokens("blocks", [1, 2, 1], 100, "own", 300 + 2 * OWN_TOKENS + 7)
    whole = tuple(tokens)
    assert len(whole) == len(tokens)
    assert whole[:100] == whole[200:300] != whole[100:200]
    for begin, end in ((0, 5), (95, 105), (299, 301), (300, 300 + OWN_TOKENS + 1), (-3, None), (50, 40)):
        assert tokens[begin:end] == whole[begin:end]
    assert (tokens[0], tokens[-1], tokens[::3]) == (whole[0], whole[-1], whole[::3])
    with pytest.raises(IndexError):
        tokens[len(tokens)]
    assert tokens == whole
    assert tokens == RecordedTokens("blocks", [1, 2, 1], 100, "own", len(tokens))
    assert tokens != RecordedTokens("blocks", [1, 2, 1], 100, "another", len(tokens))
    assert hash(tokens) == hash(whole)


# Lines that contradict themselves


@pytest.mark.parametrize(
    ("length", "count", "given", "words"),
    [
        (521, 33, None, "33 'hash_ids' of 512 tokens contradict 'input_length' = 521, blocks of 16 fit: give --block-tokens 16"),
        (12_000, 24, 16, "24 'hash_ids' of 16 tokens contradict 'input_length' = 12000, blocks of 512 fit"),
        (12_000, 188, None, "blocks of 64 fit"),
        (3, 9, None, "no size of blocks fits"),
    ],
)  # fmt: skip
def test_block_ids_that_contradict_a_length_are_refused(
    tmp_path: Path, length: int, count: int, given: int | None, words: str
) -> None:
    path = written(tmp_path, LINE, {"input_length": length, "output_length": 1, "hash_ids": list(range(count))})
    with pytest.raises(WorkloadError, match=rf"line 2: .*{words}"):
        read_trace(path, TraceOptions(block_tokens=given), 0)


def test_a_last_block_that_is_not_full_may_have_no_id(tmp_path: Path) -> None:
    for count in (2, 3):
        path = written(tmp_path, {"input_length": 1030, "output_length": 1, "hash_ids": list(range(count))})
        assert len(read_trace(path, TraceOptions(), 0)[0].turns[0].context) == 1030


@pytest.mark.parametrize("step", [0.31, 1])
def test_seconds_that_are_read_as_milliseconds_are_refused(tmp_path: Path, step: float) -> None:
    path = written(tmp_path, *({"timestamp": round(number * step, 2)} | LINE for number in range(60)))
    with pytest.raises(WorkloadError, match="requests a second: say what they are with --time-unit s"):
        read_trace(path, TraceOptions(), 0)
    assert read_trace(path, TraceOptions(unit="s"), 0)[-1].start_s == pytest.approx(59 * step)
    assert read_trace(path, TraceOptions(unit="ms"), 0)[-1].start_s == pytest.approx(59 * step / 1000)


def test_lines_out_of_time_order_within_a_session_are_refused(tmp_path: Path) -> None:
    one, other = ({"session_id": "a", "timestamp": time} | LINE for time in (200, 100))
    path = written(tmp_path, one, LINE, other)
    with pytest.raises(
        WorkloadError, match="line 3: a timestamp before that of line 1, both of session 'a': order the"
    ):
        read_trace(path, TraceOptions(), 0)
    assert [session.start_s for session in read_trace(written(tmp_path, one, other), TraceOptions(pace="open"), 0)] == [
        0.1,
        0.0,
    ]


def test_a_later_turn_with_a_time_and_no_delay_starts_then_or_after_the_answer(tmp_path: Path) -> None:
    path = written(tmp_path, *({"session_id": "a", "timestamp": time} | LINE for time in (100, 160, 600)))
    sessions = read_trace(path, TraceOptions(speed=2.0), 0)
    assert [turn.at_s for turn in sessions[0].turns] == [0.0, pytest.approx(0.03), pytest.approx(0.25)]
    walk = session_walk(sessions)
    assert [due.at_s for due in walk.begin(7.0)] == [7.0]
    assert [due.at_s for due in walk.end(TurnKey("a", 0), 7.1)] == [7.1]
    assert [due.at_s for due in walk.end(TurnKey("a", 1), 7.2)] == [pytest.approx(7.25)]


# Files


def test_a_name_that_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, LINE | {"session_id": "é"}, LINE | {"session_id": "a\ud800"})
    with pytest.raises(WorkloadError, match=r"line 2: the name 'a\\ud800' is no text"):
        read_trace(path, TraceOptions(), 0)


def test_an_open_replay_loses_no_session_whose_name_looks_like_that_of_a_line(tmp_path: Path) -> None:
    names = ["a", "a", "a.1", "a.2", "a.2", "a.1."]
    lines = [LINE | {"timestamp": number, "session_id": name} for number, name in enumerate(names)]
    sessions = read_trace(written(tmp_path, *lines), TraceOptions(pace="open"), 0)
    assert len(by_name(sessions)) == len(lines)


def test_ignored_fields_are_named_once(tmp_path: Path) -> None:
    path = written(tmp_path, LINE | {"cost": 3, "tool_events": []}, LINE | {"cost": 4, "model": "m"})
    said = Trace(path, TraceOptions()).summary()
    assert said[0].startswith("Trace trace.jsonl, Mooncake: 2 requests in 2 sessions, 20 tokens of prompts")
    assert said[1:] == ["Fields of the trace that a replay does not use: cost, tool_events, model."]


@pytest.mark.parametrize("form", ["mark", "array", "lines of an array", "packed", "one object"])
def test_forms_of_files_that_hold_the_same(tmp_path: Path, form: str) -> None:
    lines = [{"timestamp": 5, "input_length": 20, "output_length": 2}] * (1 if form == "one object" else 2)
    plain = "".join(json.dumps(line) + "\n" for line in lines)
    content = {
        "mark": b"\xef\xbb\xbf" + plain.encode(),
        "array": json.dumps(lines).encode(),
        "lines of an array": json.dumps(lines, indent=1).encode(),
        "packed": gzip.compress(plain.encode()),
        "one object": json.dumps(lines[0], indent=1).encode(),
    }[form]
    (tmp_path / "other").write_bytes(content)
    (tmp_path / "plain").write_text(plain)
    assert read_trace(tmp_path / "other", TraceOptions(), 0) == read_trace(tmp_path / "plain", TraceOptions(), 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a,b\n1,2\n", "line 2: CSV with the columns a, b is not read, only Azure's TIMESTAMP, ContextTokens"),
        (
            b"TIMESTAMP,ContextTokens,GeneratedTokens\n" + b"x" * 200_000 + b",1,2\n",
            "line 2: not CSV .field larger than",
        ),
        (b'[{"input_length": 3}', "line 1: not JSON"),
        (b"[1]", "entry 1: not a JSON object"),
        (b'[{"input_length": 3}, {"input_length": 0}]', "entry 2: 'input_length' = 0 is not allowed"),
        (b"\x1f\x8bzzz", "cannot be read"),
        (
            b'{"input_length": 3}\n{"chat_id": 3, "input_length": 3}\n',
            "line 2: is Bailian's form, and the lines before are",
        ),
        (b'{"chat_id": 3, "input_length": 3}\n{"input_length": 3}\n', "line 2: is Mooncake's form"),
        (
            b'{"schema": "x", "version": 1, "block_size": 16}\n',
            "line 1: Dynamo's rows with a header and 'dependencies'",
        ),
    ],
)
def test_forms_of_files_that_are_not_read_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "trace").write_bytes(content)
    with pytest.raises(WorkloadError, match=words):
        read_trace(tmp_path / "trace", TraceOptions(), 0)


def test_a_separator_of_lines_within_a_text_separates_none(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text('{"input_length": 3, "session_id": "a\u2028b"}\n')
    assert [session.name for session in read_trace(tmp_path / "trace", TraceOptions(), 0)] == ["a\u2028b"]


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    written(tmp_path, LINE, name="b.jsonl")
    written(tmp_path, LINE | {"input_length": 3}, LINE, name="a.jsonl")
    (tmp_path / "README").write_text("not a trace")
    sessions = read_trace(tmp_path, TraceOptions(), 0)
    assert [len(session.turns[0].context) for session in sessions] == [3, 10, 10]
    (tmp_path / "empty").mkdir()
    with pytest.raises(WorkloadError, match="is a folder without files that end in"):
        read_trace(tmp_path / "empty", TraceOptions(), 0)


def test_mooncakes_other_names_of_fields(tmp_path: Path) -> None:
    other = {"session_id": "a", "created_time": 5, "input_tokens": 10, "output_tokens": 2}
    path = written(tmp_path, other, {"session_id": "a", "input_tokens": 10, "output_tokens": 2, "delay_ms": 250})
    session = read_trace(path, TraceOptions(unit="s"), 0)[0]
    assert [(len(turn.added), turn.answer, turn.tool_s) for turn in session.turns] == [(10, 2, 0.0), (10, 2, 0.25)]


# Azure


def test_azures_csv(tmp_path: Path) -> None:
    (tmp_path / "conv.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,374,44\n2023-11-16 18:17:04.0319600,20,0\n"
    )
    trace = Trace(tmp_path / "conv.csv", TraceOptions(pace="open"))
    sessions = trace.sessions(0)
    assert [(len(one.turns[0].context), one.turns[0].answer) for one in sessions] == [(374, 44), (20, 1)]
    assert sessions[1].start_s == pytest.approx(0.052)
    assert trace.summary()[-1] == "Requests without an answer, replayed with an answer of one token: 1."


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("yesterday,3,4", "line 2: 'TIMESTAMP' = 'yesterday' is not a date and time"),
        ("2024-05-10 00:00:00.009930+00:00,0,4", "'ContextTokens' = '0' is not allowed"),
        ("2024-05-10 00:00:00.009930+00:00,3", "line 2: the number of values is not that of the header's"),
    ],
)
def test_wrong_rows_of_azures_csv(tmp_path: Path, row: str, words: str) -> None:
    (tmp_path / "code.csv").write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{row}\n")
    with pytest.raises(WorkloadError, match=words):
        read_trace(tmp_path / "code.csv", TraceOptions(), 0)


# Bailian


def chat(name: int, parent: int, time: float, *ids: int, length: int | None = None) -> dict:
    return {
        "chat_id": name,
        "parent_chat_id": parent,
        "timestamp": time,
        "input_length": 16 * len(ids) - 3 if length is None else length,
        "output_length": 40,
        "type": "text",
        "turn": 1,
        "hash_ids": list(ids),
    }


def test_bailians_chats(tmp_path: Path) -> None:
    """Seconds, 16 tokens a block, chats by their parents; of two that continue the same one the second is its own session.

    The next prompt of a chat with thinking has blocks where the thoughts were; the others go on from the answer.
    """
    path = written(
        tmp_path,
        chat(7, -1, 60.5, 1, 2, 3),
        chat(8, -1, 61.0, 1, 4),
        chat(9, 7, 75.5, 1, 2, 3, 5, 6, 7),
        chat(10, 7, 80.5, 1, 2, 9),
        chat(11, 555, 81.0, 1, 8),
    )
    trace = Trace(path, TraceOptions())
    sessions = by_name(trace.sessions(0))
    assert list(sessions) == ["request-7", "request-8", "request-10", "request-11"]
    first, second = sessions["request-7"].turns
    assert (len(first.context), len(second.context)) == (45, 93)
    assert second.context[:32] == first.context[:32]
    assert second.at_s == pytest.approx(15.0)
    forked = sessions["request-10"]
    assert (forked.turns[0].waits, forked.turns[0].at_s) == ((TurnKey("request-7", 0),), pytest.approx(20.0))
    assert forked.turns[0].context[:32] == first.context[:32] != forked.turns[0].context[16:48]
    assert (sessions["request-11"].start_s, forked.parent) == (pytest.approx(20.5), None)
    assert sessions["request-8"].phase(0) == "cold"
    assert forked.phase(0) == "resume"
    said = trace.summary()
    assert "Bailian: 5 requests in 4 sessions" in said[0]
    assert "16 tokens per hash id, 20.5 s from the first to the last" in said[0]
    assert said[1:] == [
        "Fields of the trace that a replay does not use: type.",
        "Chats that continue one that is not in the trace, and start by themselves: 1.",
    ]


def test_chats_without_block_ids_begin_with_what_was_sent_before(tmp_path: Path) -> None:
    lines = [chat(1, -1, 0.0, length=700), chat(2, 1, 5.0, length=1500)]
    first, second = read_trace(written(tmp_path, *lines), TraceOptions(), 0)[0].turns
    assert (len(first.context), len(second.context)) == (700, 1500)
    assert second.context[:700] == first.context[:]


# Dynamo


def row(name: str, session: str, **more) -> dict:
    return {"request_id": name, "session_id": session, "input_length": 100, "output_length": 1, "hash_ids": [1]} | more


AGENTIC = [
    row("p1", "main", timestamp=0, branches=["c1", "d1"], prefix_reset=True),
    row("c1", "child", wait_for=["p1"], delay=10),
    row("d1", "other", wait_for=["p1"]),
    row("c2", "child", wait_for=["c1"], delay=10, tool_wait_ms=90),
    row("p2", "main", wait_for=["p1", "c2", "d1"], tool_wait_ms=30),
    row("p3", "main", timestamp=50),
]


def test_dynamos_waits_and_branches(tmp_path: Path) -> None:
    trace = Trace(written(tmp_path, *AGENTIC), TraceOptions(block_tokens=128))
    sessions = by_name(trace.sessions(0))
    assert list(sessions) == ["main", "child", "other", "main#2"]
    assert waits(sessions["main"]) == [(), (TurnKey("child", 1), TurnKey("other", 0))]
    assert waits(sessions["child"]) == [(TurnKey("main", 0),), ()]
    assert [turn.tool_s for turn in sessions["child"].turns] == [0.01, pytest.approx(0.1)]
    assert {session.parent for session in sessions.values()} == {None, "main"}
    assert sessions["main#2"].start_s == pytest.approx(0.05)
    assert trace.summary()[1] == "Fields of the trace that a replay does not use: prefix_reset."
    server = replayed(list(sessions.values()))
    ended, sent = server.ended, server.sent
    assert sent["child/0"] >= ended["main/0"] + 0.01
    assert sent["child/1"] >= ended["child/0"] + 0.1
    assert sent["main/1"] >= max(ended["child/1"], ended["other/0"]) + 0.03
    assert sent["main#2/0"] < ended["child/0"] + 0.1
    assert server.parents == {"main": None, "main#2": None, "child": "main", "other": "main"}


def test_priorities_are_sent(tmp_path: Path) -> None:
    lines = [{"session_id": "a", "priority": -2}, {"session_id": "a"}, {"session_id": "b", "priority": 0}]
    path = written(tmp_path, *(LINE | {"timestamp": 0} | line for line in lines))
    assert len(Trace(path, TraceOptions()).summary()) == 1
    closed = replayed(read_trace(path, TraceOptions(), 0))
    assert closed.priorities == {"a/0": -2, "a/1": None, "b/0": 0}
    opened = replayed(read_trace(path, TraceOptions(pace="open"), 0))
    assert opened.priorities == {"a.1/0": -2, "a.2/0": None, "b/0": 0}


BLOCKING = [
    row("p1", "main", timestamp=0, branches=["c1", "d1"]),
    row("c1", "child", wait_for=["p1"], blocks_parent=True),
    row("d1", "other", wait_for=["p1"], delay=200, blocks_parent=False),
    row("c2", "child", wait_for=["c1"], delay=20, blocks_parent=True),
    row("p2", "main", delay=10),
    row("p3", "main", wait_for=["p2"]),
]


def test_a_blocking_sub_agent_holds_its_parent_back(tmp_path: Path) -> None:
    """The next request of the parent waits for it, and for no other sub-agent."""
    trace = Trace(written(tmp_path, *BLOCKING), TraceOptions(block_tokens=128))
    sessions = by_name(trace.sessions(0))
    assert list(sessions) == ["main", "child", "other"]
    assert waits(sessions["main"]) == [(), (TurnKey("child", 0), TurnKey("child", 1)), ()]
    assert len(trace.summary()) == 1
    server = replayed(list(sessions.values()))
    ended, sent = server.ended, server.sent
    assert sent["main/1"] >= ended["child/1"] + 0.01
    assert sent["main/1"] < ended["other/0"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [row("p1", "main"), row("c1", "child", blocks_parent=True)],
            "line 2: 'blocks_parent' is given, and no line of another",
        ),
        (
            [row("p1", "main", branches=["p2"]), row("p2", "main", blocks_parent=True)],
            "line 2: 'blocks_parent' is given, and no",
        ),
        (
            [
                row("p1", "main", branches=["c1"]),
                row("c1", "child", wait_for=["p1"]),
                LINE | {"session_id": "child", "hash_ids": [1], "blocks_parent": True},
            ],
            "line 3: 'blocks_parent' is given; then it and the line",
        ),
        (
            [
                row("p1", "main", branches=["c1"]),
                row("c1", "child", wait_for=["p2"], blocks_parent=True),
                row("p2", "main"),
            ],
            "waits for .*, which waits for it: leave one wait out",
        ),
        ([row("p1", "main", blocks_parent="yes")], "'blocks_parent' = 'yes' is not allowed: it must be true or false"),
        ([row("p1", "main", priority=1.5)], "'priority' = 1.5 is not allowed: it must be a whole number"),
        ([row("p1", "main", priority=1 << 31)], "'priority' = 2147483648 is not allowed"),
    ],
)
def test_wrong_fields_of_gateways_are_named(tmp_path: Path, rows: list[dict], words: str) -> None:
    with pytest.raises(WorkloadError, match=words):
        read_trace(written(tmp_path, *rows), TraceOptions(block_tokens=128), 0)


def test_rows_replayed_by_the_clock_have_names_of_their_own(tmp_path: Path) -> None:
    rows = [row | {"timestamp": 10 * number} for number, row in enumerate(AGENTIC)]
    sessions = read_trace(written(tmp_path, *rows), TraceOptions(block_tokens=128, pace="open"), 0)
    assert len({session.name for session in sessions}) == len(sessions) == 6
    assert sorted(session.start_s for session in sessions) == pytest.approx([0, 0.01, 0.02, 0.03, 0.04, 0.05])
    session_walk(sessions)


def test_what_waits_for_a_request_that_failed_goes_on(tmp_path: Path) -> None:
    sessions = read_trace(written(tmp_path, *AGENTIC), TraceOptions(block_tokens=128), 0)
    assert set(replayed(sessions, fails="other").sent) == {
        "main/0",
        "main/1",
        "child/0",
        "child/1",
        "other/0",
        "main#2/0",
    }


def test_a_branch_without_a_time_starts_when_its_spawner_is_over(tmp_path: Path) -> None:
    path = written(tmp_path, row("c", "child"), row("p", "main", timestamp=3, branches=["c"]))
    sessions = by_name(read_trace(path, TraceOptions(block_tokens=128), 0))
    assert (waits(sessions["child"]), sessions["child"].parent) == ([(TurnKey("main", 0),)], "main")


@pytest.mark.parametrize(
    ("rows", "limit", "words"),
    [
        ([row("a", "s", wait_for=["b"])], None, "line 1: waits for 'b', no line has this 'request_id'"),
        ([row("a", "s", wait_for=["b"]), row("b", "t")], 1, "not among the first 1 lines: raise --limit"),
        ([row("a", "s", wait_for=["b"]), row("b", "t", wait_for=["a"])], None, "waits for '.', which waits for it"),
        ([row("a", "s", wait_for=["a"])], None, "line 1: waits for 'a', which waits for it"),
        ([row("a", "s"), row("a", "t", wait_for=["a"])], None, "line 2: its name 'a' is also that of line 1"),
        ([row("a", "s", wait_for="b")], None, "'wait_for' = 'b' is not allowed: it must be a list of names"),
    ],
)
def test_wrong_links_between_rows(tmp_path: Path, rows: list, limit: int | None, words: str) -> None:
    with pytest.raises(WorkloadError, match=words):
        read_trace(written(tmp_path, *rows), TraceOptions(block_tokens=128, limit=limit), 0)


# Weka


def call(time: float, blocks: int, **more) -> dict:
    return {"t": time, "type": "s", "model": "m", "in": 64 * blocks, "out": 5, "hash_ids": list(range(blocks))} | more


def agents(name: str, offset: float = 0.0) -> dict:
    """A session with two sub-agents between its second and its third request.

    Args:
        offset: what their times count from.
    """
    return {
        "id": name,
        "block_size": 64,
        "models": ["m"],
        "requests": [
            call(0.0, 2, api_time=1.0),
            call(3.0, 3, api_time=1.0, think_time=2.0),
            *(
                {
                    "t": 4.5,
                    "type": "subagent",
                    "agent_id": agent,
                    "requests": [call(4.5 - offset, 1, api_time=1.0), call(7.0 - offset, 2, think_time=1.5, out=0)],
                }
                for agent in ("x", "y")
            ),
            call(8.0, 4, think_time=4.0),
        ],
    }


@pytest.mark.parametrize("offset", [0.0, 4.5])
def test_wekas_sessions_and_sub_agents(tmp_path: Path, offset: float) -> None:
    (tmp_path / "one.json").write_text(json.dumps(agents("one", offset), indent=1))
    trace = Trace(tmp_path / "one.json", TraceOptions())
    sessions = by_name(trace.sessions(0))
    assert list(sessions) == ["one", "one:x", "one:y"]
    assert [len(turn.context) for turn in sessions["one"].turns] == [128, 192, 256]
    assert [turn.tool_s for turn in sessions["one"].turns] == [0.0, 2.0, pytest.approx(1.0)]
    assert waits(sessions["one"])[2] == (TurnKey("one:x", 1), TurnKey("one:y", 1))
    for name in ("one:x", "one:y"):
        assert waits(sessions[name]) == [(TurnKey("one", 1),), ()]
        assert [turn.tool_s for turn in sessions[name].turns] == [pytest.approx(0.5), 1.5]
        assert sessions[name].parent == "one"
        assert sessions[name].turns[0].context[:] == sessions["one"].turns[0].context[:64]
    said = trace.summary()
    assert "Weka: 7 requests in 3 sessions" in said[0]
    assert "64 tokens per hash id" in said[0]
    assert said[1:] == [
        "Fields of the trace that a replay does not use: models, model.",
        "Requests without an answer, replayed with an answer of one token: 2.",
    ]


def test_equal_ids_in_two_of_wekas_files_are_equal_tokens_only_where_they_say_so(tmp_path: Path) -> None:
    for scope, same in (("local", False), ("global", True), (None, False)):
        lines = [agents(name) | ({} if scope is None else {"hash_id_scope": scope}) for name in ("one", "two")]
        sessions = by_name(read_trace(written(tmp_path, *lines), TraceOptions(), 0))
        first, second = (sessions[name].turns[0].context[:] for name in ("one", "two"))
        assert (first == second) == same
        assert (sessions["two"].phase(0) == "resume") == same


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_size": None}, "no 'block_size'"),
        (
            {"block_size": 512},
            "request 1: 2 'hash_ids' of 512 tokens contradict 'input_length' = 128, blocks of 64 fit",
        ),
        ({"requests": [3]}, "request 1 is no JSON object"),
        ({"requests": [{"t": 0, "type": "z", "in": 3}]}, "'type' = 'z' is not known"),
        ({"requests": [{"t": 0, "type": "n", "out": 3}]}, "no 'in': give the prompt's length"),
    ],
)
def test_wrong_sessions_of_weka(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(WorkloadError, match=words):
        read_trace(written(tmp_path, agents("one") | change), TraceOptions(), 0)


# Sessions that wait for each other


def test_turns_that_wait_for_each_other_or_for_none_are_refused() -> None:
    a = Session("a", "a", (Turn((1,), 1, waits=(TurnKey("b", 0),)),))
    b = Session("b", "b", (Turn((1,), 1, waits=(TurnKey("a", 0),)),))
    with pytest.raises(WorkloadError, match=r"waits = .* is not allowed, the sessions 'a', 'b' wait for each other"):
        session_walk([a, b])
    with pytest.raises(WorkloadError, match=r"waits = \('b', 0\) is not allowed, there is no such turn"):
        session_walk([a])
