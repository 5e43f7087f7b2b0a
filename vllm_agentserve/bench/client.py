"""A light streaming client of the OpenAI completions endpoint that stamps every token when it arrives.

Bytes are stamped before anything else is done with them, and parsing an event takes about a microsecond; so the streams of
one client hardly delay each other, and the client takes little of the cores it shares with the server.
"""

import io
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import aiohttp
import msgspec

from vllm_agentserve.bench.sessions import CRITICAL_HINT, LAST_HINT, PARENT_HINT, PRIORITY_HINT
from vllm_agentserve.pages import authorization

SILENCE_S = 600.0
"""A stream that says nothing for so long is given up, as by clients of the OpenAI API: load control holds calls for less."""


LARGE_BODY = 1 << 18
RANK_HEADER = "X-data-parallel-rank"
"""With it a client of vLLM says which data-parallel engine is to serve its request."""


class StreamError(RuntimeError):
    """The server refused a request, or its stream broke off; the message holds the server's own words."""


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens_details: Details | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    token_ids: list[int] | None = None


class Event(msgspec.Struct):
    """What matters of one server-sent event of the completions endpoint; servers without token ids leave them out."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


decode_event = msgspec.json.Decoder(Event).decode


@dataclass
class Stream:
    """What a client saw of one request. Times in seconds of `time.perf_counter()`.

    `stamps` holds the arrival of every token; tokens that came in one event share one.
    """

    kind: str = ""
    sent: float = 0.0
    stamps: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    cached_tokens: int | None = None
    finished: float = 0.0
    refusal: Any = None
    _counted: int = 0
    _rest: bytes = b""

    @property
    def ttft(self) -> float:
        """Time to the first token in seconds."""
        return self.stamps[0] - self.sent

    def gaps(self) -> list[tuple[float, float]]:
        """(begin, end) of every interval between two tokens."""
        return list(zip(self.stamps, self.stamps[1:], strict=False))

    def feed(self, stamp: float, data: bytes) -> None:
        """Takes bytes that arrived at `stamp`; an event belongs to the bytes that complete it.

        Raises:
            msgspec.MsgspecError: they are not what a completions endpoint sends.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                self._take(stamp, decode_event(line[6:]))

    def _take(self, stamp: float, event: Event) -> None:
        if event.error is not None:
            self.refusal = event.error
            return
        tokens = 0
        if event.choices:
            choice = event.choices[0]
            if choice.token_ids is not None:
                tokens = len(choice.token_ids)
                self.token_ids.extend(choice.token_ids)
            else:
                tokens = int(bool(choice.text))
        if event.usage is not None:
            # Without token ids the running usage is the better count: one event may hold several tokens.
            if not self.token_ids and event.usage.completion_tokens:
                tokens = event.usage.completion_tokens - self._counted
            if event.usage.prompt_tokens_details is not None:
                self.cached_tokens = event.usage.prompt_tokens_details.cached_tokens
        self._counted += tokens
        if tokens == 1:
            self.stamps.append(stamp)
        else:
            self.stamps.extend([stamp] * tokens)


class StreamingClient:
    """Sends prompts of token ids to one server; many streams may run at once.

    Args:
        url: the server, without a path.
        model: the name it serves.
        extensions: whether the server knows vLLM's own fields (`return_token_ids`, `session_id`, `vllm_xargs`).
        key: API key, for servers that want one.
    """

    def __init__(self, url: str, model: str = "model", extensions: bool = True, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self.key = key
        self.extensions = extensions
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "StreamingClient":
        self._session = aiohttp.ClientSession(
            headers=authorization(self.key),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=SILENCE_S),
            connector=aiohttp.TCPConnector(limit=0),
            read_bufsize=1 << 20,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def body(
        self,
        prompt: list[int] | msgspec.Raw,
        max_tokens: int,
        session_id: str | None,
        fixed: bool,
        pinned: int | None = None,
        parent: str | None = None,
        last: bool = False,
        priority: int | None = None,
        critical: bool = False,
    ) -> bytes:
        """The request as it goes over the wire."""
        fields: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": fixed,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": not self.extensions},
        }
        if self.extensions:
            fields["return_token_ids"] = True
            if pinned is not None:
                fields["allowed_token_ids"] = [pinned]
            if session_id is not None:
                fields["session_id"] = session_id
            hints: dict[str, Any] = {} if parent is None else {PARENT_HINT: parent}
            if last:
                hints[LAST_HINT] = True
            if priority is not None:
                hints[PRIORITY_HINT] = priority
            if critical:
                hints[CRITICAL_HINT] = True
            if hints:
                fields["vllm_xargs"] = hints
        return msgspec.json.encode(fields)

    async def generate(
        self,
        kind: str,
        prompt: list[int] | msgspec.Raw,
        max_tokens: int,
        session_id: str | None = None,
        into: Stream | None = None,
        fixed: bool = True,
        pinned: int | None = None,
        parent: str | None = None,
        due: float | None = None,
        last: bool = False,
        rank: int | None = None,
        priority: int | None = None,
        critical: bool = False,
    ) -> Stream:
        """Streams greedy tokens.

        Args:
            prompt: token ids, or the list of them as JSON.
            kind: what the request is to the workload; kept in the stream.
            into: a stream to fill; after an error or a cancellation it holds what came until then.
            fixed: exactly `max_tokens`, end-of-sequence ignored, so that every arm does the same work; otherwise at most.
            pinned: the only token the server may sample, where it knows vLLM's fields.
            parent: the session that spawned this one, where it knows vLLM's fields.
            due: when it should have been sent, in seconds of `perf_counter()`: times are counted from then on.
            last: whether the session ends with it, for servers that know vLLM's fields.
            rank: the data-parallel engine that is to serve it, for vLLM; None leaves that to the server.
            priority: of the request, for servers that know vLLM's fields; None for none.
            critical: whether the request is critical, for servers that know vLLM's fields.

        Raises:
            StreamError: the server cannot be reached, refuses the request, or breaks the stream off.
        """
        if self._session is None:
            raise RuntimeError("use `async with` to open the client first")
        body = self.body(prompt, max_tokens, session_id, fixed, pinned, parent, last, priority, critical)
        stream = into or Stream()
        stream.kind, stream.sent = kind, perf_counter() if due is None else due
        # Bytes are written at once, files in pieces between which other streams are read.
        headers = {"Content-Type": "application/json"}
        if rank is not None and self.extensions:
            headers[RANK_HEADER] = str(rank)
        payload = body if len(body) < LARGE_BODY else io.BytesIO(body)
        try:
            async with self._session.post(f"{self.url}/v1/completions", data=payload, headers=headers) as answer:
                if answer.status != 200:
                    raise StreamError(
                        f"{self.url} answered {answer.status}: {(await answer.text(errors='replace'))[:500]}"
                    )
                content = answer.content
                while data := await content.readany():
                    stream.feed(perf_counter(), data)
        except aiohttp.ClientConnectorError as error:
            raise StreamError(f"{self.url} cannot be reached: {error}") from error
        except msgspec.MsgspecError as error:
            raise StreamError(f"{self.url} does not answer like a completions endpoint: {error}") from error
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            words = str(error) or type(error).__name__
            raise StreamError(f"{self.url} broke the stream off after {len(stream.stamps)} tokens: {words}") from error
        finally:
            stream.finished = perf_counter()
        done = len(stream.stamps)
        if stream.refusal is not None:
            raise StreamError(f"{self.url} broke the stream off after {done} tokens: {stream.refusal}")
        if (fixed and done < max_tokens) or not done:
            raise StreamError(f"{self.url} ended the stream after {done} of {max_tokens} tokens")
        return stream
