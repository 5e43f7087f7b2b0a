"""Prefill on another engine: which calls, what the prefiller is asked, and what the conversation's own engine gets then.

The engine on which a conversation lives, its decoder, asks a prefiller for the first prompt and reads the KV from there. All
later turns find their context in the decoder's own cache, so KV moves once. Whatever goes wrong, the decoder computes the
prompt itself.
"""

import asyncio
import dataclasses
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from vllm_agentserve.cluster.relay import RelayedRequest, value_of

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/messages")
"""Whose requests can name KV to be read."""
PARAMS = "kv_transfer_params"
ASKED = {"do_remote_decode": True, "do_remote_prefill": False}
"""What a prefiller is told: keep the KV, another engine comes for it."""
LOCAL = ("prompt_logprobs", "prompt_embeds", "echo", "use_beam_search", PARAMS)
"""Fields whose calls are computed where they are answered."""
NOT_ASKED = ("stream_options", "min_tokens", "logprobs", "top_logprobs", "logprob_token_ids")
"""Fields that say nothing of the prompt, and do not go with one token or without a stream."""
MEDIA = (b'"image_url"', b'"image"', b'"input_audio"', b'"audio_url"', b'"video_url"')
"""What an engine would fetch again: it may get something else."""
LONGEST_BODY = 8 << 20
"""Bytes of a request's body. Longer ones are computed where they are answered: while one is read here no stream goes on."""
AGAIN_S = 30.0
"""A prefiller that did not answer is asked no sooner."""
REFUSALS = 3
"""After so many refusals in a row prefillers are left alone for as long."""
OUTCOMES = ("moved", "refused", "failed", "late")
"""Of asking a prefiller: its KV was read; it answered with an error; it could not answer; it did not answer in time."""
Answer = tuple[int, bytes]
"""Status and content of a prefiller's answer. `UNREACHED`: it could not be asked; `ENDED`: it ended while it had the request."""
UNREACHED, ENDED = 503, 502


class Prefills:
    """Decides for one decoder which prompts a prefiller computes, and asks for them.

    Args:
        ask: a prefiller; may raise any exception.
        tokens: prompts that are shorter are computed here.
        seconds: a prefiller that has not answered by then is not waited for.
        max_sessions: conversations that are remembered.
        clock: seconds that do not go back.
    """

    def __init__(
        self,
        ask: Callable[[RelayedRequest], Awaitable[Answer]],
        tokens: int,
        seconds: float,
        max_sessions: int = 65536,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._tokens = tokens
        self._seconds = seconds
        self._max_sessions = max_sessions
        self._clock = clock
        self._known: OrderedDict[str, None] = OrderedDict()
        """Conversations that have been here: the cache has their context."""
        self._again_s = 0.0
        self._refusals = 0
        """In a row."""

    async def prepared(self, request: RelayedRequest, prompt_tokens: int) -> tuple[RelayedRequest, str]:
        """The request as this engine is to get it, and one of `OUTCOMES`; "" if no prefiller was asked.

        Args:
            request: as it came.
            prompt_tokens: of its prompt.
        """
        caller = request.caller
        first = self._is_first(caller.session)
        if not first or caller.parent in self._known or prompt_tokens < self._tokens or self._clock() < self._again_s:
            return request, ""
        asked = prefill_request(request)
        if asked is None:
            return request, ""
        try:
            # `asyncio.wait_for` would lose the cancellation of a client that leaves just now, in Python 3.11.
            async with asyncio.timeout(self._seconds):
                status, content = await self._answer(asked)
        except TimeoutError:
            self._pause()
            return request, "late"
        except asyncio.CancelledError:
            self._known.pop(caller.session, None)
            raise
        if status in (UNREACHED, ENDED):
            self._pause()
            return request, "failed"
        given = decode_request(request, content) if status == 200 else None
        self._refusals = 0 if given is not None else self._refusals + 1
        if self._refusals >= REFUSALS:
            self._refusals = 0
            self._pause()
        return (request, "refused") if given is None else (given, "moved")

    def _pause(self) -> None:
        self._again_s = self._clock() + AGAIN_S

    async def _answer(self, asked: RelayedRequest) -> Answer:
        """That of a prefiller; of another one where the first cannot be asked. One that ended with the request may have ended of
        it: no other prefiller gets it."""
        found: Answer = UNREACHED, b""
        for _ in range(2):
            try:
                found = await self._ask(asked)
            except Exception:
                found = UNREACHED, b""
            if found[0] != UNREACHED:
                break
        return found

    def _is_first(self, session: str) -> bool:
        """Whether nothing of that conversation has been here. Without a name nobody knows."""
        if not session:
            return False
        first = session not in self._known
        self._known[session] = None
        self._known.move_to_end(session)
        if len(self._known) > self._max_sessions:
            self._known.popitem(last=False)
        return first


def names_kv(request: RelayedRequest) -> bool:
    """Whether a client's request says what KV to read or to keep. Only engines may say that to each other: a client could read
    what others sent, or end an engine."""
    body, key = request.body, PARAMS
    # Escapes may spell it, and JSON may be UTF-16.
    if key.encode() not in body and b"\\u" not in body and b"\0" not in body:
        return False

    def found(pairs: list[tuple[str, Any]]) -> None:
        if any(name == key for name, _ in pairs):
            raise NamesKv

    try:
        # As vLLM reads it.
        json.loads(body, object_pairs_hook=found)
    except NamesKv:
        return True
    except (ValueError, RecursionError):
        return key.encode() in body
    return False


class NamesKv(Exception):
    """A JSON object has the key."""


def prefill_request(request: RelayedRequest) -> RelayedRequest | None:
    """What a prefiller is asked: the same prompt, and one token. None if the call has to be computed where it is answered."""
    import msgspec

    encoding, body = value_of(request.headers, b"content-encoding"), request.body
    if request.method != "POST" or request.path.partition("?")[0] not in PATHS or encoding not in (b"", b"identity"):
        return None
    if len(body) > LONGEST_BODY or any(word in body for word in MEDIA):
        return None
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        values = {name: msgspec.json.decode(fields[name]) for name in (*LOCAL, *CHECKED) if name in fields}
        if not is_plain(values):
            return None
        if "prompt" in fields and not is_one_prompt(msgspec.json.decode(fields["prompt"])):
            return None
    except (ValueError, RecursionError):
        return None
    given: dict[str, Any] = {name: value for name, value in fields.items() if name not in NOT_ASKED}
    given |= {"stream": False, "max_tokens": 1, PARAMS: ASKED}
    if "max_completion_tokens" in given:
        given["max_completion_tokens"] = 1
    return dataclasses.replace(request, body=msgspec.json.encode(given))


COUNTS = ("max_tokens", "max_completion_tokens", "n", "best_of", "min_tokens", "top_logprobs")
CHECKED = (*COUNTS, "stream", "stream_options", "logprobs", "logprob_token_ids", "tool_choice")
"""Fields that a prefiller is not asked with. Wrong ones would be refused after it has computed the prompt, and keeps its KV."""


def is_plain(values: Mapping[str, Any]) -> bool:
    """Whether a prefiller can compute the prompt of a call with these fields, and the call itself will not be refused."""
    if any(values.get(name) is not None and values.get(name) is not False for name in LOCAL):
        return False
    for name in COUNTS:
        value, least = values.get(name), 0 if name in ("min_tokens", "top_logprobs") else 1
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            return False
    if any(values.get(name) not in (None, 1) for name in ("n", "best_of")):
        return False
    logprobs = values.get("logprobs")
    if not (logprobs is None or isinstance(logprobs, bool) or (isinstance(logprobs, int) and logprobs >= 0)):
        return False
    if not logprobs and (values.get("top_logprobs") or values.get("logprob_token_ids")):
        return False
    if values.get("stream_options") is not None and values.get("stream") is not True:
        return False
    # Of a tool that is named one token is no JSON, which some interfaces answer with an error.
    return not isinstance(values.get("tool_choice"), dict)


def is_one_prompt(prompt: Any) -> bool:
    """Whether it is a text or a list of token ids, and not several."""
    return isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(one, int) for one in prompt))


def decode_request(request: RelayedRequest, answer: bytes) -> RelayedRequest | None:
    """The request with what a prefiller's answer says of its KV; None if it says nothing."""
    import msgspec

    try:
        found = msgspec.json.decode(answer)
        fields: dict[str, Any] = msgspec.json.decode(request.body, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):
        return None
    params = found.get(PARAMS) if isinstance(found, dict) else None
    if not isinstance(params, dict) or not params.get("do_remote_prefill"):
        return None
    return dataclasses.replace(request, body=msgspec.json.encode(fields | {PARAMS: params}))
