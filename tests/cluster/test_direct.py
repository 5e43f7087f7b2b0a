"""An ingress's own connections to engines of its machine, with small servers in the place of vLLM."""

import asyncio
import os
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.cluster.test_pins import Clock
from vllm_agentserve.cluster import connection
from vllm_agentserve.cluster.answers import Answers
from vllm_agentserve.cluster.caller import Caller
from vllm_agentserve.cluster.connection import MARK, EngineConnection
from vllm_agentserve.cluster.direct import AGAIN_S, MOST, PROCESS_ENDED, DirectConnections, life_of
from vllm_agentserve.cluster.engine import Engine, connected_to
from vllm_agentserve.cluster.relay import Failure, Head, Part, RelayedRequest

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
REQUEST = RelayedRequest("POST", "/v1/completions", body=b"{}")
USAGE = b'{"usage": {"prompt_tokens": 30, "completion_tokens": 4}}'


def answering(status: str, content: bytes = b"") -> Handler:
    """Answers every request with this one answer."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await writer.drain()
        writer.close()

    return handle


def healthy(handle: Handler, asked: Callable[[], str] = lambda: "200 OK") -> Handler:
    """Gives questions of health this status, and other requests to `handle` without their first line."""

    async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"/health" in await reader.readline():
            await answering(asked())(reader, writer)
        else:
            await handle(reader, writer)

    return both


@asynccontextmanager
async def listening(path: Path, handle: Handler) -> AsyncIterator[str]:
    server = await asyncio.start_unix_server(handle, str(path))
    try:
        yield str(path)
    finally:
        server.close()
        path.unlink(missing_ok=True)


@pytest.fixture
async def connections() -> AsyncIterator[DirectConnections]:
    found = DirectConnections(Clock())
    yield found
    for one in found._known.values():
        await one.close()


async def parts_of(connection: EngineConnection) -> list[Part]:
    return [part async for part in connection.answer(REQUEST)]


async def test_an_engine_that_listens_is_asked_by_one_connection(
    connections: DirectConnections, tmp_path: Path
) -> None:
    async with listening(tmp_path / "engine", answering("200 OK", b"whole")) as path:
        found = await connections.to("e1", path)
        assert found is not None
        assert found is await connections.to("e1", path)
        head, body = await parts_of(found)
    assert isinstance(head, Head)
    assert (head.status, body) == (200, b"whole")


async def test_an_engine_without_a_socket_is_left_to_ray(connections: DirectConnections) -> None:
    assert await connections.to("e1", "") is None


async def test_an_engine_whose_socket_is_not_here_is_left_to_ray_and_tried_again_later(
    connections: DirectConnections, tmp_path: Path
) -> None:
    clock = connections._clock
    assert isinstance(clock, Clock)
    path = tmp_path / "engine"
    assert await connections.to("e1", str(path)) is None
    async with listening(path, answering("200 OK")):
        clock.now += AGAIN_S / 2
        assert await connections.to("e1", str(path)) is None
        clock.now += AGAIN_S
        assert await connections.to("e1", str(path)) is not None


async def test_an_engine_that_is_not_healthy_yet_is_left_to_ray(connections: DirectConnections, tmp_path: Path) -> None:
    async with listening(tmp_path / "engine", answering("503 Service Unavailable")) as path:
        assert await connections.to("e1", path) is None


async def test_a_request_for_an_engine_that_has_ended_has_gone_nowhere(
    connections: DirectConnections, tmp_path: Path
) -> None:
    """So that another engine may get it, and does: the failure does not say that the engine may have seen it."""
    async with listening(tmp_path / "engine", answering("200 OK")) as path:
        found = await connections.to("e1", path)
    assert found is not None
    for _ in range(2):
        (failure,) = await parts_of(found)
        assert isinstance(failure, Failure)
        assert not failure.delivered
    assert await connections.to("e1", path) is found


async def test_an_engine_whose_core_has_ended_gets_no_more_requests(
    connections: DirectConnections, tmp_path: Path
) -> None:
    healthy = [True]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        well = b"/health" in line and healthy[0]
        status = "200 OK" if well else "503 Service Unavailable" if b"/health" in line else "500 Internal Server Error"
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    async with listening(tmp_path / "engine", handle) as path:
        found = await connections.to("e1", path)
        assert found is not None
        own = await parts_of(found)
        assert isinstance(own[0], Head)
        assert own[0].status == 500
        healthy[0] = False
        first, second = await parts_of(found), await parts_of(found)
    assert [one.delivered for one in (*first, *second) if isinstance(one, Failure)] == [True, False]


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n",
    ],
)
async def test_a_server_that_stops_listening_leaves_no_request_without_an_end(
    connections: DirectConnections, tmp_path: Path, begun: bytes
) -> None:
    """vLLM, asked to end, stops listening and may leave streams open: nothing comes, and no error."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(begun)

    async with listening(tmp_path / "engine", healthy(handle)) as path:
        found = await connections.to("e1", path)
        assert found is not None
        answer = asyncio.ensure_future(parts_of(found))
        await asyncio.sleep(0.1)
    parts = await asyncio.wait_for(answer, 30)
    assert [type(part) for part in parts] == ([Head, bytes, Failure] if begun else [Failure])
    (failure,) = (part for part in parts if isinstance(part, Failure))
    assert failure.delivered
    (failure,) = await parts_of(found)
    assert isinstance(failure, Failure)
    assert not failure.delivered


async def test_an_engine_that_ends_without_requests_gets_none_afterwards(
    connections: DirectConnections, tmp_path: Path
) -> None:
    """It is asked while it has none, too: its first request after that has gone nowhere, and may go to another engine."""
    status = ["200 OK"]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answering(status[0])(reader, writer)

    async with listening(tmp_path / "engine", handle) as path:
        found = await connections.to("e1", path)
        assert found is not None
        status[0] = "503 Service Unavailable"
        deadline = time.monotonic() + 30
        while not found.ended and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        (failure,) = await parts_of(found)
    assert isinstance(failure, Failure)
    assert not failure.delivered


async def test_an_engine_that_refuses_for_a_moment_keeps_its_streams_and_is_used_again(
    connections: DirectConnections, tmp_path: Path
) -> None:
    asked: list[str] = []

    def status() -> str:
        asked.append("503 Service Unavailable" if len(asked) == 1 else "200 OK")
        return asked[-1]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        deadline = time.monotonic() + 30
        while len(asked) < 4 and time.monotonic() < deadline:
            writer.write(b"data: 1\n\n")
            await asyncio.sleep(0.1)
        writer.close()

    async with listening(tmp_path / "engine", healthy(handle, status)) as path:
        found = await connections.to("e1", path)
        assert found is not None
        parts = await parts_of(found)
        assert [one for one in parts if isinstance(one, Failure)] == []
        assert asked[:4] == ["200 OK", "503 Service Unavailable", "200 OK", "200 OK"]
        assert not found.ended


@pytest.mark.parametrize("how", ["core", "server"])
async def test_what_one_process_has_seen_is_known_to_all(tmp_path: Path, how: str) -> None:
    """The next turn of a conversation whose stream broke may come to another ingress."""
    healthy = [True]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        await answering("200 OK" if healthy[0] else "503 No" if b"/health" in line else "500 No")(reader, writer)

    mine, other = EngineConnection(str(tmp_path / "engine")), EngineConnection(str(tmp_path / "engine"))
    try:
        async with listening(tmp_path / "engine", handle):
            for one in (mine, other):
                assert await one.health(5.0) == 200
            healthy[0] = False
            if how == "core":
                (failure,) = await parts_of(mine)
                assert isinstance(failure, Failure)
                assert failure.delivered  # it may have been the reason
                (failure,) = await parts_of(other)
                assert isinstance(failure, Failure)
                assert not failure.delivered
                assert "EngineCore has ended" in failure.text
                # It was for a moment only, as the answers after a while say.
                healthy[0] = True
                await other.health(5.0)
                assert other.ended  # that answer may be older than what the other one saw
                os.utime(str(tmp_path / "engine") + MARK, (0, 0))
                await other.health(5.0)
                await mine.health(5.0)
                assert not other.ended
                assert not mine.ended
        if how == "server":
            await parts_of(mine)
            assert mine.ended
            assert other.ended
    finally:
        await mine.close()
        await other.close()


async def test_requests_that_break_at_once_are_one_question(connections: DirectConnections, tmp_path: Path) -> None:
    asked = []

    def status() -> str:
        asked.append(True)
        return "200 OK"

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with listening(tmp_path / "engine", healthy(handle, status)) as path:
        found = await connections.to("e1", path)
        assert found is not None
        before, began = len(asked), time.monotonic()
        failures = await asyncio.gather(*(parts_of(found) for _ in range(20)))
        # One, and one a second of the watch.
        assert len(asked) - before <= 2 + (time.monotonic() - began)
        assert all(isinstance(one, Failure) and one.delivered for (one,) in failures)
        assert not found.ended


async def test_a_long_header_of_an_answer_is_passed_on(connections: DirectConnections, tmp_path: Path) -> None:
    """vLLM repeats a header of the request in its answer to a preflight."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 9000 + b"\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with listening(tmp_path / "engine", handle) as path:
        found = await connections.to("e1", path)
        assert found is not None
        head, _ = await parts_of(found)
    assert isinstance(head, Head)
    assert (b"x-long", b"a" * 9000) in head.headers


async def test_two_that_forget_the_same_engines_get_theirs(connections: DirectConnections, tmp_path: Path) -> None:
    for name in ("dead 1", "dead 2"):
        async with listening(tmp_path / "engine", answering("200 OK")) as path:
            found = await connections.to(name, path)
        assert found is not None
        await found.close()
    async with (
        listening(tmp_path / "one", answering("200 OK")) as one,
        listening(tmp_path / "two", answering("200 OK")) as two,
    ):
        both = await asyncio.gather(connections.to("e1", one), connections.to("e2", two))
    assert all(both)
    assert list(connections._known) == ["e1", "e2"]


async def test_an_engine_whose_process_in_ray_has_ended_gets_no_more_requests(
    connections: DirectConnections, tmp_path: Path
) -> None:
    """Its server is asked to end then, and may accept requests for seconds that it does not answer."""
    with subprocess.Popen(["sleep", "300"]) as process:
        try:
            async with listening(tmp_path / "engine", answering("200 OK")) as path:
                found = await connections.to("e1", path, life_of(process.pid))
                assert found is not None
                head, _ = await parts_of(found)
                assert isinstance(head, Head)
                process.kill()
                # A zombie until it is waited for.
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                for _ in range(2):
                    (failure,) = await parts_of(found)
                    assert isinstance(failure, Failure)
                    assert (failure.text, failure.delivered) == (PROCESS_ENDED, False)
                    process.wait()
        finally:
            process.kill()


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_is_cut_short_by_an_engines_end_is_not_whole(
    connections: DirectConnections, tmp_path: Path, ends: bool, stream: bool
) -> None:
    """vLLM, asked to end, finishes its answers as aborted, with all that belongs to a whole one."""
    first, last = b'data: {"text": "a"}\n\n', b'data: {"text": "", "finish_reason": "abort"}\n\ndata: [DONE]\n\n'
    whole = first + last if stream else b'{"text": "a", "finish_reason": "abort"}'
    kind = b"text/event-stream" if stream else b"application/json"
    with subprocess.Popen(["sleep", "300"]) as process:

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if ends:
                process.kill()
                process.wait()
            head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (kind, len(whole))
            writer.write(head + whole)
            writer.close()

        async with listening(tmp_path / "engine", healthy(handle)) as path:
            found = await connections.to("e1", path, life_of(process.pid))
            assert found is not None
            parts = await parts_of(found)
        process.kill()
    content = b"".join(part for part in parts if isinstance(part, bytes))
    failures = [part for part in parts if isinstance(part, Failure)]
    if ends:
        assert content == (first if stream else b"")
        assert [one.delivered for one in failures] == [True]
    else:
        assert (content, failures) == (whole, [])


async def test_a_process_that_is_not_visible_says_nothing(connections: DirectConnections, tmp_path: Path) -> None:
    for told in ("", "no number", f"{os.getpid()} 1", f"{2**22 - 1} 77"):
        async with listening(tmp_path / "engine", answering("200 OK")) as path:
            found = await connections.to(told, path, told)
            assert found is not None
            head, _ = await parts_of(found)
            assert isinstance(head, Head)
    assert life_of(os.getpid()).startswith(f"{os.getpid()} ")


@pytest.mark.parametrize(("answers", "breaks"), [("532532532532", False), ("5333", True), ("533253325332", False)])
async def test_streams_are_broken_off_after_three_questions_in_a_row(
    connections: DirectConnections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: str, breaks: bool
) -> None:
    """5: the first contact. 3: it refuses. 2: it is healthy."""
    monkeypatch.setattr(connection, "WATCH_S", 0.02)
    monkeypatch.setattr(connection, "MARK_S", 0.0)
    left = list(answers)

    def status() -> str:
        return "503 No" if left and left.pop(0) == "3" else "200 OK"

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        deadline = time.monotonic() + 30
        while left and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if not breaks:
            writer.close()

    async with listening(tmp_path / "engine", healthy(handle, status)) as path:
        found = await connections.to("e1", path)
        assert found is not None
        parts = await asyncio.wait_for(parts_of(found), 30)
    assert bool([one for one in parts if isinstance(one, Failure)]) == breaks


async def test_half_a_body_is_no_answer(connections: DirectConnections, tmp_path: Path) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"half": ')

    async with listening(tmp_path / "engine", healthy(handle)) as path:
        found = await connections.to("e1", path)
        assert found is not None
        answer = asyncio.ensure_future(parts_of(found))
        await asyncio.sleep(0.1)
        await found.close()
        (failure,) = await asyncio.wait_for(answer, 30)
    assert isinstance(failure, Failure)
    assert failure.delivered


async def test_an_engine_with_requests_is_not_forgotten(connections: DirectConnections, tmp_path: Path) -> None:
    ends = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await ends.wait()
        writer.close()

    async with listening(tmp_path / "engine", healthy(handle)) as path:
        found = await connections.to("busy", path)
        assert found is not None
        answer = asyncio.ensure_future(parts_of(found))
        await asyncio.sleep(0.1)
        for number in range(MOST + 3):
            await connections.to(f"e{number}", str(tmp_path / "nobody"))
        ends.set()
        assert [type(part) for part in await asyncio.wait_for(answer, 30)] == [Head, bytes]
    assert len(connections._known) == MOST + 1


async def test_engines_that_have_ended_are_forgotten(connections: DirectConnections, tmp_path: Path) -> None:
    async with listening(tmp_path / "engine", answering("200 OK")) as path:
        found = await connections.to("e1", path)
    assert found is not None
    await found.close()
    await connections.to("e2", str(tmp_path / "other"))
    assert list(connections._known) == ["e2"]


async def test_not_more_engines_are_remembered_than_allowed(connections: DirectConnections, tmp_path: Path) -> None:
    for number in range(MOST + 3):
        await connections.to(f"e{number}", str(tmp_path / "nobody"))
    assert len(connections._known) == MOST
    assert len(connections._missed_s) == MOST


class Told:
    """What a table of pins is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, int, bool]] = []

    async def finished(self, session: str, engine: str, context_tokens: int, last: bool) -> None:
        self.calls.append((session, engine, context_tokens, last))


async def made(*parts: Part) -> AsyncIterator[Part]:
    for part in parts:
        yield part


@pytest.mark.parametrize(
    ("content", "tokens", "rate"), [([USAGE], 34, 0.3), ([b"data: 1\n\n", b"data: 2\n\n"], 25 + 2, None)]
)
async def test_an_answer_names_its_engine_and_is_counted(content: list[bytes], tokens: int, rate: float | None) -> None:
    told = Told()
    answers = Answers(told)
    request = RelayedRequest("POST", "/v1/completions", caller=Caller("s", characters=100, last=True))
    found = [part async for part in answers.of("e1", request, made(Head(200, ()), *content))]  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert found == [Head(200, ((b"x-agentserve-engine", b"e1"),)), *content]
    assert told.calls == [("s", "e1", tokens, True)]
    assert answers.per_character == rate


async def test_an_answer_that_is_left_is_counted_and_its_source_is_closed_at_once() -> None:
    told, closed = Told(), []

    async def source() -> AsyncIterator[Part]:
        try:
            yield Head(200, ())
            yield b"data: 1\n\n"
            yield b"data: 2\n\n"
        finally:
            closed.append(True)

    request = RelayedRequest("POST", "/v1/completions", caller=Caller("s", tokens=10))
    answer = Answers(told).of("e1", request, source())  # type: ignore[arg-type]
    await anext(answer)
    await anext(answer)
    await answer.aclose()
    assert closed == [True]
    await asyncio.sleep(0)
    assert told.calls == [("s", "e1", 11, False)]


def test_an_engine_that_is_to_end_waits_for_its_requests(tmp_path: Path) -> None:
    engine = Engine("model", (), {})
    engine._process = SimpleNamespace(poll=lambda: None)  # type: ignore[assignment]
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(engine.socket)
        server.listen()
        client.connect(engine.socket)
        began = time.monotonic()
        engine.wait_until_idle(0.5)
        assert time.monotonic() - began >= 0.5
        threading.Timer(0.5, client.close).start()
        taken, _ = server.accept()
        threading.Timer(0.5, taken.close).start()
        began = time.monotonic()
        engine.wait_until_idle(60.0)
        assert 0.3 <= time.monotonic() - began < 30
        began = time.monotonic()
        engine.wait_until_idle(60.0)
        assert time.monotonic() - began < 30
    engine._process = None
    engine.stop()


def test_connections_of_a_socket_are_counted(tmp_path: Path) -> None:
    path = str(tmp_path / "engine")
    # Sockets of others may have any names.
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as server:
        other.bind(b"\0" + os.urandom(8) + b"\xff\xfe")
        server.bind(path)
        server.listen()
        assert connected_to(path) == 0
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            assert connected_to(path) == 1
            taken, _ = server.accept()
            with taken:
                assert connected_to(path) == 1
        assert connected_to(path) == 0
