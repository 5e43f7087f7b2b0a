"""Prefill on another engine: which calls, what the prefiller is asked, and what the conversation's own engine gets then.

The engine on which a conversation lives, its decoder, asks a prefiller for the first prompt and reads the KV from there. All
later turns find their context in the decoder's own cache, so KV moves once. Whatever goes wrong, the decoder computes the
prompt itself.
"""

import asyncio
import dataclasses
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from vllm_agentserve.cluster.relay import RelayedRequest, value_of

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/messages")
"""Whose requests can name KV to be read."""
PARAMS = "kv_transfer_params"
ASKED = {"do_remote_decode": True, "do_remote_prefill": False}
"""What a prefiller is told: keep the KV, another engine comes for it."""
LOCAL = ("prompt_logprobs", "echo", "use_beam_search", PARAMS)
"""Fields whose calls are computed where they are answered."""
NOT_ASKED = ("stream_options", "min_tokens", "logprobs", "top_logprobs")
"""Fields that say nothing of the prompt, and do not go with one token or without a stream."""
AGAIN_S = 30.0
"""A prefiller that did not answer is asked no sooner."""
OUTCOMES = ("moved", "refused", "failed", "late")
"""Of asking a prefiller: its KV was read; it answered with an error; it could not answer; it did not answer in time."""
Answer = tuple[int, bytes]
"""Status and content of a prefiller's answer; the status 503 says that it could not be asked."""


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
            status, content = await asyncio.wait_for(self._ask(asked), self._seconds)
        except TimeoutError:
            self._again_s = self._clock() + AGAIN_S
            return request, "late"
        except Exception:
            status, content = 503, b""
        if status == 503:
            self._again_s = self._clock() + AGAIN_S
            return request, "failed"
        given = decode_request(request, content) if status == 200 else None
        return (request, "refused") if given is None else (given, "moved")

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


def prefill_request(request: RelayedRequest) -> RelayedRequest | None:
    """What a prefiller is asked: the same prompt, and one token. None if the call has to be computed where it is answered."""
    import msgspec

    encoding = value_of(request.headers, b"content-encoding")
    if request.method != "POST" or request.path.partition("?")[0] not in PATHS or encoding not in (b"", b"identity"):
        return None
    try:
        fields = msgspec.json.decode(request.body, type=dict[str, msgspec.Raw])
        values = {name: msgspec.json.decode(fields[name]) for name in (*LOCAL, "n", "best_of") if name in fields}
        if any(values.get(name) not in (None, False) for name in LOCAL):
            return None
        if any(values.get(name) not in (None, 1) for name in ("n", "best_of")):
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
