"""The ingress as an ASGI application, with engines that are made up here."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import pytest

from vllm_agentserve.cluster.ingress import IngressApplication
from vllm_agentserve.cluster.relay import Failure, Head, Part, RelayedRequest, Taken

STREAM = Head(200, ((b"content-type", b"text/event-stream"), (b"x-agentserve-engine", b"e1")))
ANSWER = Head(200, ((b"content-type", b"application/json"), (b"x-agentserve-engine", b"e1")))
Parts = list[Part | Exception]


class Engines:
    """Answers with given parts; what it was sent is in `requests`."""

    def __init__(self, *answers: Parts, waits: bool = False) -> None:
        self.answers = list(answers)
        self.requests: list[RelayedRequest] = []
        self.waits = waits
        self.closed = 0

    async def send_to(self, request: RelayedRequest) -> AsyncGenerator[Part, None]:
        self.requests.append(request)
        parts = self.answers[min(len(self.requests), len(self.answers)) - 1]
        try:
            for part in parts:
                if isinstance(part, Exception):
                    raise part
                yield part
            if self.waits:
                await asyncio.sleep(60)
        finally:
            self.closed += 1


async def no_table() -> Mapping[str, Any]:
    raise RuntimeError("no table")


async def ask(
    engines: Engines,
    path: str = "/v1/chat/completions",
    body: bytes = b'{"messages": []}',
    method: str = "POST",
    headers: list[tuple[bytes, bytes]] | None = None,
    shown: Callable[[], Any] = no_table,
    leaves_after: int | None = None,
    taken_s: float = 5.0,
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer; 0 if there was none."""
    sent: list[Mapping[str, Any]] = []
    pieces = [body[: len(body) // 2], body[len(body) // 2 :]]
    left = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if pieces:
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == leaves_after:
            left.set()

    address, _, query = path.partition("?")
    scope = {
        **{"type": "http", "method": method, "path": address, "raw_path": address.encode(), "query_string": query.encode()},
        "headers": headers or [],
    }  # fmt: skip
    if leaves_after == 0:
        left.set()
    await IngressApplication(engines.send_to, shown, taken_s=taken_s)(scope, receive, send)
    if not sent:
        return 0, {}, b""
    content = b"".join(message.get("body", b"") for message in sent[1:])
    if leaves_after is None:
        assert not sent[-1]["more_body"]
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}, content


async def test_an_answer_passes_as_it_is() -> None:
    engines = Engines([Taken("e1"), ANSWER, b'{"a": 1}'])
    status, headers, content = await ask(engines, "/v1/chat/completions?x=%20y", headers=[(b"X-Session-ID", b"s")])
    assert (status, content) == (200, b'{"a": 1}')
    assert headers["x-agentserve-engine"] == "e1"
    (request,) = engines.requests
    assert (request.method, request.path, request.body) == ("POST", "/v1/chat/completions?x=%20y", b'{"messages": []}')
    assert request.caller.session == "s"
    assert engines.closed == 1


async def test_errors_of_the_engine_pass_as_they_are() -> None:
    engines = Engines([Taken("e1"), Head(404, ((b"content-type", b"application/json"),)), b"no such model"])
    assert (await ask(engines))[::2] == (404, b"no such model")


async def test_an_answer_may_have_no_body() -> None:
    engines = Engines([Taken("e1"), Head(200, ()), b""])
    assert (await ask(engines, "/health", b"", "GET"))[::2] == (200, b"")


async def test_a_stream_passes_as_it_comes() -> None:
    engines = Engines([Taken("e1"), STREAM, b"data: 1\n\n", b"data: [DONE]\n\n"])
    assert await ask(engines) == (200, dict(content_type(STREAM)), b"data: 1\n\ndata: [DONE]\n\n")


def content_type(head: Head) -> list[tuple[str, str]]:
    return [(name.decode(), value.decode()) for name, value in head.headers]


@pytest.mark.parametrize("end", [Failure("killed", True), RuntimeError("the actor died")])
async def test_a_stream_that_breaks_ends_with_an_error(end: Part | Exception) -> None:
    engines = Engines([Taken("e1"), STREAM, b"data: 1\n\n", end])
    status, _, content = await ask(engines)
    first, error, rest = content.split(b"\n\n")
    assert (status, first, rest) == (200, b"data: 1", b"")
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == 500
    assert b"[DONE]" not in content


@pytest.mark.parametrize("end", [Failure("killed", True), RuntimeError("the actor died")])
@pytest.mark.parametrize("before", [[], [Taken("e1")], [Taken("e1"), ANSWER]], ids=len)
async def test_an_answer_that_breaks_is_an_error(before: Parts, end: Part | Exception) -> None:
    """It may have been computed, so nobody else is asked: a request that kills engines would kill all of them."""
    engines = Engines([*before, end], [Taken("e2"), ANSWER, b"{}"])
    status, headers, content = await ask(engines)
    assert status == 503
    assert int(headers["retry-after"]) > 0
    assert json.loads(content)["error"]["type"] == "ServiceUnavailableError"
    assert len(engines.requests) == 1


async def test_a_request_that_went_nowhere_goes_to_another_engine() -> None:
    gone = Failure("vllm serve ended", delivered=False)
    engines = Engines([Taken("e1"), gone], [Taken("e2"), gone], [Taken("e3"), ANSWER, b"{}"])
    assert (await ask(engines))[::2] == (200, b"{}")
    assert [one.avoid for one in engines.requests] == [(), ("e1",), ("e1", "e2")]
    everywhere = Engines([Taken("e1"), gone])
    assert (await ask(everywhere))[0] == 503
    assert len(everywhere.requests) == 3


async def test_a_request_that_nobody_takes_is_refused() -> None:
    engines = Engines([], waits=True)
    status, _, content = await ask(engines, taken_s=0.02)
    assert status == 503
    assert "no engine has taken the request within" in json.loads(content)["error"]["message"]
    assert engines.closed == 1


@pytest.mark.parametrize("leaves_after", [0, 1, 2])
async def test_a_client_that_leaves_ends_its_call(leaves_after: int) -> None:
    engines = Engines([Taken("e1"), STREAM, b"data: 1\n\n"], waits=True)
    asked = asyncio.create_task(ask(engines, leaves_after=leaves_after))
    ended, _ = await asyncio.wait([asked], timeout=5)
    asked.cancel()
    assert asked in ended
    asked.result()
    assert engines.closed == len(engines.requests)


async def test_a_client_that_leaves_while_it_sends_is_not_handed_on() -> None:
    engines = Engines([Taken("e1"), ANSWER])

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await IngressApplication(engines.send_to, no_table)(scope, receive, receive)  # type: ignore[arg-type]
    assert engines.requests == []


async def test_one_page_of_metrics_has_all_engines() -> None:
    async def shown() -> Mapping[str, Any]:
        return {
            "decisions": {"first": 2},
            "moves": 0,
            "prefills": {},
            "timings": {},
            "pins": 2,
            "resident_tokens": {"e1": 10, "e2": 0},
            "engine_pins": {"e1": 2, "e2": 0},
            "engine_moves": {"e1": 0, "e2": 0},
        }

    engines = Engines([Taken("e1"), Head(200, ()), b"# TYPE x gauge\nx 1.0\n"], [Taken("e2"), Failure("gone", False)])
    status, _, content = await ask(engines, "/metrics", b"", "GET", shown=shown)
    assert status == 200
    assert b'x{replica="e1"} 1.0' in content
    assert b'agentserve_cluster_decisions_total{reason="first"} 2' in content
    assert b'agentserve_cluster_engine_resident_tokens{replica="e2"} 0' in content
    assert [one.engine for one in engines.requests] == ["e1", "e2"]
    assert (await ask(engines, "/metrics", b"", "GET"))[0] == 503


async def test_a_lifespan_is_answered() -> None:
    coming, sent = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}], []

    async def receive() -> Any:
        return coming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await IngressApplication(Engines([]).send_to, no_table)({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
