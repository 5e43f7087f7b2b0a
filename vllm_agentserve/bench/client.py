"""A light streaming client of the OpenAI completions endpoint that stamps every token when it arrives."""

import json
from dataclasses import dataclass, field
from time import perf_counter

import aiohttp


class StreamError(RuntimeError):
    """The server refused a request, or its stream broke off; the message holds the server's own words."""


@dataclass
class Stream:
    """What a client saw of one request. Times in seconds of `time.perf_counter()`.

    `stamps` holds the arrival of every event with text in it; with one token per event these are the tokens.
    """

    kind: str
    sent: float
    stamps: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finished: float = 0.0

    @property
    def ttft(self) -> float:
        """Time to the first token in seconds."""
        return self.stamps[0] - self.sent

    def gaps(self) -> list[tuple[float, float]]:
        """(begin, end) of every interval between two tokens."""
        return list(zip(self.stamps, self.stamps[1:], strict=False))


class StreamingClient:
    """Sends prompts of token ids to one server; many streams may run at once.

    Args:
        url: the server, without a path.
        model: the name it serves.
    """

    def __init__(self, url: str, model: str = "model") -> None:
        self.url = url.rstrip("/")
        self.model = model
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "StreamingClient":
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_read=300), connector=aiohttp.TCPConnector(limit=0)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def generate(
        self, kind: str, prompt: list[int], max_tokens: int, session_id: str | None = None, into: Stream | None = None
    ) -> Stream:
        """Streams `max_tokens` greedy tokens; end-of-sequence is ignored, so that every arm does the same work.

        Args:
            kind: what the request is to the workload; kept in the stream.
            into: a stream to fill, for callers that look at it while it runs.
        """
        if self._session is None:
            raise RuntimeError("use `async with` to open the client first")
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        if session_id is not None:
            body["session_id"] = session_id
        stream = into or Stream(kind, 0.0)
        stream.kind, stream.sent = kind, perf_counter()
        try:
            async with self._session.post(f"{self.url}/v1/completions", json=body) as answer:
                if answer.status != 200:
                    raise StreamError(f"{self.url} answered {answer.status}: {(await answer.text())[:500]}")
                async for line in answer.content:
                    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                        continue
                    now = perf_counter()
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise StreamError(f"{self.url} broke the stream off: {event['error']}")
                    ids = event["choices"][0].get("token_ids") if event.get("choices") else None
                    if ids:
                        stream.stamps.append(now)
                        stream.token_ids.extend(ids)
        except aiohttp.ClientError as error:
            raise StreamError(
                f"{self.url} broke the stream off after {len(stream.token_ids)} tokens: {error}"
            ) from error
        stream.finished = perf_counter()
        if len(stream.token_ids) < max_tokens:
            raise StreamError(f"{self.url} ended the stream after {len(stream.token_ids)} of {max_tokens} tokens")
        return stream
