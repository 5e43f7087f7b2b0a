"""The API server's middleware: what agents and gateways say of a request in forms of their own becomes `vllm_xargs`.

It is an ASGI class for vLLM's own option `--middleware`; the plugin adds it where our scheduler is chosen. A body is only parsed
if the request may name something, and then its top level only. It is read when the application asks for it: after vLLM has
checked the API key.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vllm_agentserve.policy.clients import BODY_FIELDS, HEADERS, client_hints

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
LONGEST_BODY = 64 << 20
"""Bytes of a body that is read; a larger one passes as it is."""
MARKS = tuple(field.encode() for field in BODY_FIELDS)
FIELDS = ("agent_hint", "metadata", "previous_response_id", "prompt_cache_key", "session_id", "vllm_xargs")
"""Of a body; all others pass as the bytes they are."""
LONGEST_FIELD = 1 << 20
"""Bytes of the JSON of one of these; a body with a longer one passes as it is."""


class ClientNames:
    """Adds what a request's headers and body say to its `vllm_xargs`, where `read_hints` finds it.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope.get("method") == "POST" and scope["path"].endswith(PATHS):
            # Of a header that is there twice the first counts, as for vLLM.
            given = reversed(list(scope["headers"]))
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in given}
            if headers.get("content-encoding", "identity") == "identity":
                receive = RewrittenBody(headers, receive).receive
        await self._app(scope, receive, send)


class RewrittenBody:
    """The body of one request, in one message.

    Args:
        headers: of the request.
        receive: gives the next message.
    """

    def __init__(self, headers: dict[str, str], receive: Receive) -> None:
        self._headers = {name: value for name, value in headers.items() if name in HEADERS}
        self._receive = receive
        self._pending: list[Message] | None = None
        """What is still to be given; None before the body was asked for."""

    async def receive(self) -> Message:
        if self._pending is None:
            self._pending = await self._read()
        return self._pending.pop(0) if self._pending else await self._receive()

    async def _read(self) -> list[Message]:
        messages: list[Message] = []
        size = 0
        while not messages or messages[-1].get("more_body"):
            message = await self._receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if message["type"] != "http.request" or size > LONGEST_BODY:
                return messages
        body = b"".join(message.get("body", b"") for message in messages)
        return [{"type": "http.request", "body": with_names(self._headers, body), "more_body": False}]


def with_names(headers: dict[str, str], body: bytes) -> bytes:
    """A JSON body with what it and its headers say in `vllm_xargs`; unchanged where there is nothing, or it is no such body."""
    if not headers and not any(mark in body for mark in MARKS):
        return body
    import msgspec

    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        raw = {name: fields[name] for name in FIELDS if name in fields}
        if any(memoryview(content).nbytes > LONGEST_FIELD for content in raw.values()):
            # Millions of values in an object of a client would hold up every other request.
            return body
        known = {name: msgspec.json.decode(content) for name, content in raw.items()}
        arguments = known.get("vllm_xargs")
        if not isinstance(arguments, (dict, type(None))):
            return body
        hints = client_hints(headers, known)
        if not hints:
            return body
        rest = {
            name: value for name, value in (arguments or {}).items() if name not in ("agentic_context", "agent_hint")
        }
        fields["vllm_xargs"] = msgspec.Raw(msgspec.json.encode(rest | hints))
        return msgspec.json.encode(fields)
    except (ValueError, RecursionError):
        return body
