"""What goes between an ingress and an engine's process: a request, and what its answer is made of."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_agentserve.cluster.caller import NOBODY, Caller

Header = tuple[bytes, bytes]
HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
"""Headers of one connection, which no other one gets."""
ENGINE_HEADER = b"x-agentserve-engine"
"""In every answer: the engine that gave it."""
PROMPT_TOKENS = re.compile(rb'"(?:prompt|input)_tokens":\s*(\d{1,12})')
ANSWER_TOKENS = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,12})')
USAGE_BYTES = 4096
"""Bytes at the end of an answer in which its usage is looked for."""
EVENT = b"\n\n"
"""What ends a server-sent event."""


@dataclass(frozen=True, slots=True)
class RelayedRequest:
    """A request on its way to an engine.

    Args:
        method: of HTTP.
        path: of its address, percent-encoded as it came, with the query.
        headers: without those of its connection.
        body: all of it.
        caller: whose it is.
        avoid: engines that it must not go to.
        engine: the one that it has to go to; "" for any.
        per_character: tokens per character of prompts, as far as the ingress knows.
    """

    method: str
    path: str
    headers: tuple[Header, ...] = ()
    body: bytes = b""
    caller: Caller = NOBODY
    avoid: tuple[str, ...] = ()
    engine: str = ""
    per_character: float | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """The engine's process has the request."""

    engine: str


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers of an answer. Its body follows as bytes."""

    status: int
    headers: tuple[Header, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """The engine cannot answer, or not to the end.

    Args:
        text: why.
        delivered: whether it may have seen the request.
    """

    text: str
    delivered: bool


Part = Taken | Head | Failure | bytes
"""`Taken` comes first. Then `Head` and bytes, or a `Failure`; a `Failure` may also come after some bytes."""


def end_to_end(headers: Iterable[Header], *left_out: bytes) -> tuple[Header, ...]:
    """Headers without those of one connection, and without those left out."""
    found = [(name.lower(), value) for name, value in headers]
    named = {one.strip().lower() for name, value in found if name == b"connection" for one in value.split(b",")}
    return tuple(one for one in found if one[0] not in HOP and one[0] not in named and one[0] not in left_out)


def value_of(headers: Sequence[Header], name: bytes) -> bytes:
    """The first header of that name, in lower case; empty if there is none."""
    return next((value for key, value in headers if key == name), b"")


def is_stream(headers: Sequence[Header]) -> bool:
    return value_of(headers, b"content-type").startswith(b"text/event-stream")


class WholeEvents:
    """Bytes of a stream of events, given on up to the end of the last whole event: a stream that breaks has no half event."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, more: bytes) -> bytes:
        """What can be given on now."""
        both = self._rest + more
        end = both.rfind(EVENT)
        if end < 0:
            self._rest = both
            return b""
        self._rest = both[end + len(EVENT) :]
        return both[: end + len(EVENT)]

    def rest(self) -> bytes:
        """What is left after the end of a stream that did not break."""
        rest, self._rest = self._rest, b""
        return rest


def usage(tail: bytes) -> tuple[int, int] | None:
    """Tokens of the prompt and of the answer that the end of an answer names; None if it does not."""
    end = tail[-USAGE_BYTES:]
    prompt, answer = PROMPT_TOKENS.findall(end), ANSWER_TOKENS.findall(end)
    return (int(prompt[-1]), int(answer[-1]) if answer else 0) if prompt else None


def error_body(path: str, status: int, text: str) -> bytes:
    """An error as the interface of that path has it."""
    if path.partition("?")[0].endswith("/v1/messages"):
        kind = "invalid_request_error" if status == 400 else "api_error"
        content: object = {"type": "error", "error": {"type": kind, "message": text}}
    else:
        kind = "BadRequestError" if status == 400 else "ServiceUnavailableError"
        content = {"error": {"message": text, "type": kind, "param": None, "code": status}}
    return json.dumps(content).encode()


def error_event(path: str, text: str) -> bytes:
    """The last event of a stream that broke."""
    path = path.partition("?")[0]
    if path.endswith("/v1/messages"):
        return b"event: error\ndata: " + error_body(path, 500, text) + EVENT
    if path.endswith("/v1/responses"):
        content = {"type": "error", "code": "server_error", "message": text, "param": None, "sequence_number": 0}
        return b"event: error\ndata: " + json.dumps(content).encode() + EVENT
    return b"data: " + error_body(path, 500, text) + EVENT
