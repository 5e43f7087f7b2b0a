"""Where requests come in: reads whose each is, hands it on, and passes the answer back as it comes. An ASGI application."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from vllm_agentserve.cluster.caller import read_caller
from vllm_agentserve.cluster.merged import merged
from vllm_agentserve.cluster.relay import (
    Failure,
    Head,
    Header,
    Part,
    RelayedRequest,
    Taken,
    end_to_end,
    error_body,
    error_event,
    is_stream,
)

logger = logging.getLogger("ray.serve")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
SendTo = Callable[[RelayedRequest], AsyncGenerator[Part, None]]
"""Hands a request to an engine. The generator gives the parts of its answer, or raises; closing it cancels the call."""

TAKEN_S = 60.0
"""A request that no engine has taken by then is refused."""
RETRY_AFTER_S = 5
"""What refused clients are told."""
TRIES = 3
"""Engines that a request is handed to while those before have not received it."""
METRICS = "/metrics"
PAGE_S = 5.0
"""An engine's page of metrics that does not come by then is left out."""


class IngressApplication:
    """Args:
    send_to: hands a request to an engine.
    shown: what the table of pins shows; may raise any exception.
    client_names: whether the engines read names that clients give in forms of their own.
    taken_s: a request that no engine has taken by then is refused.
    """

    def __init__(
        self,
        send_to: SendTo,
        shown: Callable[[], Awaitable[Mapping[str, Any]]],
        client_names: bool = True,
        taken_s: float = TAKEN_S,
    ) -> None:
        self._send_to = send_to
        self._shown = shown
        self._client_names = client_names
        self._taken_s = taken_s

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1003})

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        body = await whole_body(receive)
        if body is None:
            return
        if scope["path"] == METRICS and scope["method"] == "GET":
            answering = self._metrics(send)
        else:
            answering = self._relay(self._request(scope, body), send)
        # A client that leaves must not keep an engine busy.
        answered, left = asyncio.ensure_future(answering), asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((answered, left), return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            if not answered.done():
                answered.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answered

    def _request(self, scope: Message, body: bytes) -> RelayedRequest:
        given = tuple((bytes(name).lower(), bytes(value)) for name, value in scope["headers"])
        # Of a header that is there twice the first counts, as for vLLM.
        by_name = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(given)}
        path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
        if query := scope.get("query_string"):
            path += f"?{bytes(query).decode('latin-1')}"
        caller = read_caller(scope["path"], by_name, body, self._client_names)
        return RelayedRequest(scope["method"], path, end_to_end(given), body, caller)

    async def _relay(self, request: RelayedRequest, send: Send) -> None:
        for _ in range(TRIES):
            engine = ""
            parts = self._send_to(request)
            try:
                try:
                    # `asyncio.wait_for` would lose the cancellation of a client that leaves just now, in Python 3.11.
                    async with asyncio.timeout(self._taken_s):
                        taken = await anext(parts)
                    engine = taken.engine if isinstance(taken, Taken) else ""
                    first = await anext(parts)
                except TimeoutError:
                    first = Failure(
                        f"no engine has taken the request within {self._taken_s:g} s", delivered=bool(engine)
                    )
                except Exception as error:
                    first = Failure(f"the engine's process went away ({type(error).__name__})", delivered=True)
                if isinstance(first, Head):
                    await self._pass_on(request, first, parts, send)
                    return
            finally:
                await parts.aclose()
            failure = first if isinstance(first, Failure) else Failure("the engine gave no answer", delivered=True)
            logger.warning("agentserve: %s %s: %s", request.method, request.path, failure.text)
            if failure.delivered or not engine:
                break
            request = avoiding(request, engine)
        await refuse(request.path, failure.text, send)

    async def _pass_on(self, request: RelayedRequest, head: Head, parts: AsyncIterator[Part], send: Send) -> None:
        """The rest of an answer. An answer that is no stream comes whole, so only streams can break."""
        streams = is_stream(head.headers)
        begun = streams
        if streams:
            await start(send, head.status, head.headers)
        failure: Failure | None = None
        try:
            async for part in parts:
                if isinstance(part, Failure):
                    failure = part
                    break
                if isinstance(part, bytes):
                    if not begun:
                        begun = True
                        await start(send, head.status, head.headers)
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        except Exception as error:
            failure = Failure(
                f"the engine's process went away in the middle of an answer ({type(error).__name__})", True
            )
        if failure is not None:
            logger.warning("agentserve: %s %s: %s", request.method, request.path, failure.text)
            if not begun:
                await refuse(request.path, failure.text, send)
                return
            if streams:
                event = error_event(request.path, failure.text)
                await send({"type": "http.response.body", "body": event, "more_body": True})
        if not begun:
            await start(send, head.status, head.headers)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _metrics(self, send: Send) -> None:
        try:
            shown = await self._shown()
        except Exception as error:
            await refuse(METRICS, f"the table of pins cannot be reached ({type(error).__name__})", send)
            return
        # One after the other: Ray mixes calls up that are made for one request at the same time.
        found = {name: await self._page(name) for name in shown["resident_tokens"]}
        pages = {name: page for name, page in found.items() if page is not None}
        content = merged(shown, pages).encode()
        await start(send, 200, ((b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),))
        await send({"type": "http.response.body", "body": content, "more_body": False})

    async def _page(self, engine: str) -> str | None:
        try:
            async with asyncio.timeout(PAGE_S):
                return await self._read(engine)
        except Exception:
            return None

    async def _read(self, engine: str) -> str | None:
        parts = self._send_to(RelayedRequest("GET", METRICS, engine=engine))
        content = b""
        try:
            async for part in parts:
                if isinstance(part, Failure) or (isinstance(part, Head) and part.status != 200):
                    return None
                content += part if isinstance(part, bytes) else b""
        finally:
            await parts.aclose()
        return content.decode(errors="replace")


def avoiding(request: RelayedRequest, engine: str) -> RelayedRequest:
    """The same request, for another engine."""
    return replace(request, avoid=(*request.avoid, engine))


async def lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def whole_body(receive: Receive) -> bytes | None:
    """The body of a request; None if its client has left."""
    found = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        found.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(found)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def start(send: Send, status: int, headers: tuple[Header, ...]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})


async def refuse(path: str, text: str, send: Send) -> None:
    headers = (b"content-type", b"application/json"), (b"retry-after", str(RETRY_AFTER_S).encode())
    await start(send, 503, headers)
    await send({"type": "http.response.body", "body": error_body(path, 503, text), "more_body": False})
