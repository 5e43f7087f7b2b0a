"""An engine's process and its socket, with a small server in the place of vLLM."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from vllm_agentserve.cluster.engine import Engine, EngineError
from vllm_agentserve.cluster.relay import Failure, Head, Part, RelayedRequest

SERVER = """
    import asyncio, os, signal, subprocess, sys
    from aiohttp import web
    ended = []
    async def health(request): return web.Response(status=503 if ended else 200)
    async def core_ends(request):
        ended.append(True)
        if "stream" not in request.query:
            return web.Response(status=500)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b'data: {"a": "\\\\"error\\\\""}\\n\\ndata: {"error": {"code": 500}}\\n\\ndata: [DONE]\\n\\n')
        return answer
    async def closes(request):
        os.unlink(sys.argv[sys.argv.index("--uds") + 1])
        return web.Response(status=500)
    async def own_error(request):
        if "stream" not in request.query:
            return web.Response(status=500, text="mine")
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b'data: {"error": {"code": 400}}\\n\\ndata: [DONE]\\n\\n')
        return answer
    async def echo(request):
        body = await request.read()
        names = [value.hex() for name, value in request.raw_headers if name.lower() == b"x-session-id"]
        return web.json_response(
            {"headers": sorted(request.headers), "body": body.decode(), "path": request.raw_path, "names": names}
        )
    async def cookie(request):
        return web.Response(text=request.headers.get("Cookie", ""), headers={"Set-Cookie": "who=first; Path=/"})
    async def stream(request):
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b"data: 1\\n\\ndata: 2\\n\\ndata: ha")
        if request.query.get("end") == "well":
            await answer.write(b"lf\\n\\n")
            return answer
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    async def dies(request): os.kill(os.getpid(), signal.SIGKILL)
    async def starts(request):
        script = "sleep 300 & wait"
        if "cleans" in request.query:
            script = f"trap 'touch {request.query['cleans']}; exit' TERM; {script}"
        started = subprocess.Popen(["sh", "-c", script])
        await asyncio.sleep(0.3)
        return web.Response(text=str(started.pid))
    if "--never-ready" in sys.argv:
        print("loading weights", flush=True)
        signal.pause()
    if "--bad-option" in sys.argv:
        sys.exit("vllm: error: unrecognized arguments: --bad-option")
    app = web.Application()
    app.add_routes([web.get("/health", health), web.post("/echo", echo), web.post("/stream", stream), web.post("/dies", dies),
        web.post("/cookie", cookie), web.post("/core-ends", core_ends), web.post("/own-error", own_error),
        web.post("/closes", closes), web.post("/starts", starts),
    ])
    web.run_app(app, path=sys.argv[sys.argv.index("--uds") + 1], print=None)
"""


class SmallEngine(Engine):
    def __init__(self, folder: Path, *options: str, start_timeout_s: float = 60.0) -> None:
        environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
        super().__init__("model", options, environment, start_timeout_s)
        script = folder / "server.py"
        script.write_text(textwrap.dedent(SERVER))
        self.command = [sys.executable, str(script), *self.command[4:]]


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    found = SmallEngine(tmp_path)
    try:
        await asyncio.wait_for(found.start(), 30)
        yield found
    finally:
        found.stop()


async def parts(
    engine: Engine, path: str, body: bytes = b"", headers: tuple[tuple[bytes, bytes], ...] = ()
) -> list[Part]:
    return [part async for part in engine.answer(RelayedRequest("POST", path, headers, body))]


async def test_an_answer_comes_whole(engine: Engine) -> None:
    sent = ((b"host", b"elsewhere"), (b"content-length", b"99"), (b"x-session-id", b"s"), (b"content-type", b"text/x"))
    head, content = await parts(engine, "/echo?a=%20b", b"hello", sent)
    assert isinstance(head, Head)
    assert head.status == 200
    assert isinstance(content, bytes)
    assert b'"body": "hello", "path": "/echo?a=%20b"' in content
    assert b'["Connection", "Content-Length", "Content-Type", "Host", "x-session-id"]' in content.replace(
        b"X-Session-Id", b"x-session-id"
    )


@pytest.mark.parametrize("name", ["plain", "café", "日本", "“ß”"])
async def test_names_in_headers_reach_the_engine_as_they_came(engine: Engine, name: str) -> None:
    """Otherwise the ingress pins a name that the engine's scheduler does not know."""
    _, content = await parts(engine, "/echo", headers=((b"x-session-id", name.encode()),))
    assert isinstance(content, bytes)
    assert f'"names": ["{name.encode().hex()}"]'.encode() in content


async def test_a_cookie_of_one_client_is_not_sent_for_another(engine: Engine) -> None:
    assert (await parts(engine, "/cookie"))[1] == b""
    assert (await parts(engine, "/cookie"))[1] == b""
    assert (await parts(engine, "/cookie", headers=((b"cookie", b"who=third"),)))[1] == b"who=third"


async def test_a_stream_comes_in_whole_events(engine: Engine) -> None:
    head, *events = await parts(engine, "/stream?end=well")
    assert isinstance(head, Head)
    assert b"".join(one for one in events if isinstance(one, bytes)) == b"data: 1\n\ndata: 2\n\ndata: half\n\n"
    assert all(isinstance(one, bytes) and one.endswith(b"\n\n") for one in events)


async def test_a_server_killed_in_a_stream_is_a_failure_after_the_last_whole_event(engine: Engine) -> None:
    _, *events, end = await parts(engine, "/stream")
    assert events == [b"data: 1\n\ndata: 2\n\n"]
    assert isinstance(end, Failure)
    assert end.delivered
    assert "in the middle of an answer" in end.text


async def test_a_request_to_a_server_that_has_ended_went_nowhere(engine: Engine) -> None:
    (end,) = await parts(engine, "/dies")
    assert isinstance(end, Failure)
    assert end.delivered
    (end,) = await parts(engine, "/echo")
    assert isinstance(end, Failure)
    assert not end.delivered
    assert "ended with exit code -9" in end.text
    assert not await engine.healthy(1.0)


async def test_what_a_killed_server_has_started_ends_too(engine: Engine) -> None:
    """The EngineCore of a `vllm serve` that the kernel kills would go on, and keep the memory that the next one needs."""
    _, pid = await parts(engine, "/starts")
    assert isinstance(pid, bytes)
    started = Path(f"/proc/{int(pid)}/status")
    assert started.exists()
    await parts(engine, "/dies")
    for _ in range(100):
        if not started.exists() or "\nState:\tZ" in started.read_text():
            break
        await asyncio.sleep(0.05)
    else:
        raise AssertionError("what the server has started goes on without it")


async def test_what_a_killed_server_has_started_may_clean_up(engine: Engine, tmp_path: Path) -> None:
    """Whoever removes shared memory when its users are gone is in the group too."""
    _, _ = await parts(engine, f"/starts?cleans={tmp_path / 'cleaned'}")
    await parts(engine, "/dies")
    for _ in range(100):
        if (tmp_path / "cleaned").exists():
            break
        await asyncio.sleep(0.05)
    else:
        raise AssertionError("what the server has started was killed before it could clean up")


async def test_an_error_of_an_engine_whose_core_has_ended_is_a_failure(engine: Engine) -> None:
    """Its server lives for some seconds. Nothing that comes later goes there."""
    (end,) = await parts(engine, "/core-ends")
    assert isinstance(end, Failure)
    assert end.delivered
    (end,) = await parts(engine, "/echo")
    assert isinstance(end, Failure)
    assert not end.delivered
    assert "EngineCore has ended" in end.text
    assert not await engine.healthy(1.0)


async def test_a_stream_of_an_engine_whose_core_has_ended_breaks(engine: Engine) -> None:
    _, before, end = await parts(engine, "/core-ends?stream")
    assert before == b'data: {"a": "\\"error\\""}\n\n'
    assert isinstance(end, Failure)
    assert end.delivered
    (end,) = await parts(engine, "/echo")
    assert isinstance(end, Failure)
    assert not end.delivered


async def test_nothing_goes_to_a_server_that_has_stopped_listening(engine: Engine) -> None:
    """Its process may live for a while, to end other answers."""
    (end,) = await parts(engine, "/closes")
    assert isinstance(end, Failure)
    assert end.delivered
    (end,) = await parts(engine, "/echo")
    assert isinstance(end, Failure)
    assert not end.delivered
    assert "stopped listening" in end.text
    assert not await engine.healthy(1.0)


async def test_errors_of_an_engine_that_goes_on_are_passed_on(engine: Engine) -> None:
    head, content = await parts(engine, "/own-error")
    assert isinstance(head, Head)
    assert (head.status, content) == (500, b"mine")
    head, content = await parts(engine, "/own-error?stream")
    assert isinstance(head, Head)
    assert content == b'data: {"error": {"code": 400}}\n\ndata: [DONE]\n\n'
    assert isinstance((await parts(engine, "/echo"))[0], Head)


async def test_a_wrong_option_is_said(tmp_path: Path) -> None:
    found = SmallEngine(tmp_path, "--bad-option")
    with pytest.raises(
        EngineError, match="exit code 1 while starting: vllm: error: unrecognized arguments: --bad-option"
    ):
        await asyncio.wait_for(found.start(), 30)
    found.stop()


async def test_an_engine_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    found = SmallEngine(tmp_path, "--never-ready", start_timeout_s=2.0)
    with pytest.raises(
        EngineError, match=r"not healthy within 2 s \(give it more with --start-timeout\): loading weights"
    ):
        await asyncio.wait_for(found.start(), 30)
    found.stop()
    assert not found.alive


async def test_nobody_else_can_read_its_socket(engine: Engine) -> None:
    folder = Path(engine.command[-1]).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    engine.stop()
    assert not folder.exists()


def test_an_engine_ends_with_its_parent() -> None:
    """Also if the parent is killed."""
    inner = f"[sys.executable, {str(ROOT / 'vllm_agentserve' / 'cluster' / 'child.py')!r}, str(os.getpid()), '/bin/sleep', '600']"
    code = f"import os, subprocess, sys, time\nprint(subprocess.Popen({inner}).pid, flush=True)\ntime.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    command = Path(f"/proc/{child}/cmdline")
    while b"sleep" not in command.read_bytes():
        pass
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    while command.exists() and command.read_bytes():
        pass
