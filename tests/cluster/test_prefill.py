"""Which prompts a prefiller is asked for, what it is asked, and what happens where it does not answer."""

import asyncio
import json
from typing import Any

import pytest

from vllm_agentserve.cluster.caller import read_caller
from vllm_agentserve.cluster.prefill import AGAIN_S, Answer, Prefills, decode_request, prefill_request
from vllm_agentserve.cluster.relay import RelayedRequest
from vllm_agentserve.vllm_compat.nixl import with_pause

PARAMS = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]], "remote_engine_id": "e"}
MOVED = (200, json.dumps({"id": "x", "kv_transfer_params": PARAMS}).encode())
LONG = 5000


def request(session: str = "s", path: str = "/v1/completions", **fields: Any) -> RelayedRequest:
    body = json.dumps({"model": "m", "prompt": "long", "session_id": session} | fields).encode()
    return RelayedRequest("POST", path, (), body, read_caller(path, {}, body))


class Prefiller:
    def __init__(self, answer: Answer | Exception | None = MOVED) -> None:
        self.answer = answer
        self.asked: list[RelayedRequest] = []
        self.now = 0.0

    async def __call__(self, request: RelayedRequest) -> Answer:
        self.asked.append(request)
        if self.answer is None:
            await asyncio.sleep(60)
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return self.answer

    def prefills(self, seconds: float = 5.0, max_sessions: int = 100) -> Prefills:
        return Prefills(self, 4096, seconds, max_sessions, lambda: self.now)


async def test_only_the_first_long_prompt_of_a_conversation_is_asked_for() -> None:
    prefiller = Prefiller()
    prefills = prefiller.prefills()
    given, outcome = await prefills.prepared(request(), LONG)
    assert outcome == "moved"
    assert json.loads(given.body)["kv_transfer_params"] == PARAMS
    for _ in range(3):
        assert await prefills.prepared(request(), LONG) == (request(), "")
    assert len(prefiller.asked) == 1


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        (request(), 4095),
        (request(""), LONG),
        (request(n=2), LONG),
        (request(echo=True), LONG),
        (request(prompt_logprobs=1), LONG),
        (request(prompt=["a", "b"]), LONG),
        (request(prompt=[[1], [2]]), LONG),
        (request(kv_transfer_params={"do_remote_prefill": True}), LONG),
        (request(path="/v1/responses", input="a"), LONG),
        (RelayedRequest("POST", "/v1/completions", (), b"{no json", request().caller), LONG),
        (RelayedRequest("POST", "/v1/completions", ((b"content-encoding", b"gzip"),), request().body, request().caller), LONG),
    ],
    ids=["short", "no session", "n", "echo", "prompt logprobs", "texts", "lists", "own", "path", "no json", "packed"],
)  # fmt: skip
async def test_other_prompts_are_computed_where_they_are_answered(given: RelayedRequest, tokens: int) -> None:
    prefiller = Prefiller()
    assert await prefiller.prefills().prepared(given, tokens) == (given, "")
    assert prefiller.asked == []


async def test_a_conversation_that_began_short_has_its_context_here() -> None:
    prefiller = Prefiller()
    prefills = prefiller.prefills()
    await prefills.prepared(request(), 10)
    assert await prefills.prepared(request(), LONG) == (request(), "")
    agent = request("agent", vllm_xargs={"agent_session": "agent", "agent_parent": "s"})
    assert agent.caller.parent == "s"
    assert await prefills.prepared(agent, LONG) == (agent, "")
    assert prefiller.asked == []


def test_a_prefiller_is_asked_for_one_token_of_the_same_prompt() -> None:
    given = request(
        stream=True, stream_options={"include_usage": True}, max_tokens=500, min_tokens=9, temperature=0.5, logprobs=3
    )
    asked = prefill_request(given)
    assert asked is not None
    assert json.loads(asked.body) == {
        "model": "m",
        "prompt": "long",
        "session_id": "s",
        "temperature": 0.5,
        "stream": False,
        "max_tokens": 1,
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False},
    }
    chat = prefill_request(request(path="/v1/chat/completions", messages=[], max_completion_tokens=7))
    assert chat is not None
    assert json.loads(chat.body)["max_completion_tokens"] == 1


def test_numbers_and_texts_of_a_body_go_on_as_they_came() -> None:
    body = b'{"model":"m","prompt":"\\u00e9","seed":123456789012345678901234567890,"session_id":"s"}'
    given = RelayedRequest("POST", "/v1/completions", (), body, read_caller("/v1/completions", {}, body))
    found = decode_request(given, MOVED[1])
    assert found is not None
    assert found.body.startswith(body[:-1])


@pytest.mark.parametrize(
    ("answer", "outcome", "again"),
    [
        ((503, b"it has ended"), "failed", False),
        (ConnectionError("gone"), "failed", False),
        (None, "late", False),
        ((400, b'{"error": {}}'), "refused", True),
        ((200, b"{}"), "refused", True),
        ((200, b"["), "refused", True),
    ],
    ids=["ended", "gone", "late", "error", "nothing", "no json"],
)
async def test_the_prompt_is_computed_here_where_a_prefiller_cannot(answer: Any, outcome: str, again: bool) -> None:
    """And the next ones do not wait for it."""
    prefiller = Prefiller(answer)
    prefills = prefiller.prefills(seconds=0.05)
    assert await prefills.prepared(request(), LONG) == (request(), outcome)
    await prefills.prepared(request("next"), LONG)
    assert len(prefiller.asked) == 1 + again
    prefiller.now += AGAIN_S
    prefiller.answer = MOVED
    assert (await prefills.prepared(request("later"), LONG))[1] == "moved"


async def test_conversations_that_are_remembered_are_bounded() -> None:
    prefills = Prefiller().prefills(max_sessions=3)
    for number in range(10):
        await prefills.prepared(request(f"{number}"), LONG)
    assert list(prefills._known) == ["7", "8", "9"]


def test_nixls_progress_thread_waits_where_it_is_given_no_pause() -> None:
    class Stock:
        def __init__(self) -> None:
            self._delay = 7

        @property
        def pthrDelay(self) -> int:
            return self._delay

        @pthrDelay.setter
        def pthrDelay(self, value: int) -> None:
            self._delay = value

    found = with_pause(Stock, 1000)()
    found.pthrDelay = 0
    assert found.pthrDelay == 1000
    found.pthrDelay = 5
    assert found.pthrDelay == 5
