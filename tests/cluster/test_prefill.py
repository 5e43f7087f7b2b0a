"""Which prompts a prefiller is asked for, what it is asked, and what happens where it does not answer."""

import asyncio
import json
from typing import Any

import pytest

from vllm_agentserve.cluster.caller import read_caller
from vllm_agentserve.cluster.prefill import (
    AGAIN_S,
    ENDED,
    LONGEST_BODY,
    Answer,
    Prefills,
    decode_request,
    names_kv,
    prefill_request,
)
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
        (request(prompt_logprobs=0), LONG),
        (request(prompt_embeds="AAAA"), LONG),
        (request(stream_options={"include_usage": True}), LONG),
        (request(logprobs=-5), LONG),
        (request(top_logprobs=2), LONG),
        (request(max_tokens="many"), LONG),
        (request(max_tokens=0), LONG),
        (request(max_tokens=True), LONG),
        (request(path="/v1/messages", tool_choice={"type": "tool", "name": "a"}), LONG),
        (request(path="/v1/chat/completions", messages=[{"content": [{"type": "image_url"}]}]), LONG),
        (request(prompt="x" * (LONGEST_BODY + 1)), LONG),
        (request(prompt=["a", "b"]), LONG),
        (request(prompt=[[1], [2]]), LONG),
        (request(kv_transfer_params={"do_remote_prefill": True}), LONG),
        (request(path="/v1/responses", input="a"), LONG),
        (RelayedRequest("POST", "/v1/completions", (), b"{no json", request().caller), LONG),
        (RelayedRequest("POST", "/v1/completions", ((b"content-encoding", b"gzip"),), request().body, request().caller), LONG),
    ],
    ids=[
        *("short", "no session", "n", "echo", "prompt logprobs", "none of them", "embeds", "options of no stream", "logprobs"),
        *("top logprobs", "words", "no tokens", "a truth", "a tool", "an image", "long", "texts", "lists", "own", "path"),
        *("no json", "packed"),
    ],
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
    ("answer", "outcome", "asked"),
    [
        # Another one may be there.
        ((503, b"it has ended"), "failed", 2),
        (ConnectionError("gone"), "failed", 2),
        (None, "late", 1),
        ((400, b'{"error": {}}'), "refused", 2),
        ((200, b"{}"), "refused", 2),
        ((200, b"["), "refused", 2),
    ],
    ids=["ended", "gone", "late", "error", "nothing", "no json"],
)
async def test_the_prompt_is_computed_here_where_a_prefiller_cannot(answer: Any, outcome: str, asked: int) -> None:
    """And the next ones do not wait for it."""
    prefiller = Prefiller(answer)
    prefills = prefiller.prefills(seconds=0.05)
    assert await prefills.prepared(request(), LONG) == (request(), outcome)
    await prefills.prepared(request("next"), LONG)
    assert len(prefiller.asked) == asked
    prefiller.now += AGAIN_S
    prefiller.answer = MOVED
    assert (await prefills.prepared(request("later"), LONG))[1] == "moved"


async def test_another_prefiller_is_asked_where_the_first_cannot_be() -> None:
    prefiller = Prefiller((503, b""))
    ask = prefiller.__call__

    async def second(asked: RelayedRequest) -> Answer:
        found = await ask(asked)
        prefiller.answer = MOVED
        return found

    prefills = Prefills(second, 4096, 5.0)
    assert (await prefills.prepared(request(), LONG))[1] == "moved"
    assert len(prefiller.asked) == 2


async def test_after_three_refusals_in_a_row_prefillers_are_left_alone() -> None:
    prefiller = Prefiller((400, b"{}"))
    prefills = prefiller.prefills()
    for number in range(2):
        await prefills.prepared(request(f"{number}"), LONG)
    prefiller.answer = MOVED
    await prefills.prepared(request("moved"), LONG)
    prefiller.answer = (400, b"{}")
    for number in range(3, 6):
        assert (await prefills.prepared(request(f"{number}"), LONG))[1] == "refused"
    assert (await prefills.prepared(request("next"), LONG))[1] == ""
    assert len(prefiller.asked) == 6


async def test_a_request_that_ends_a_prefiller_goes_to_no_other_prefiller() -> None:
    prefiller = Prefiller((ENDED, b"it ended before it answered"))
    assert await prefiller.prefills().prepared(request(), LONG) == (request(), "failed")
    assert len(prefiller.asked) == 1


async def test_a_client_that_leaves_meanwhile_is_not_forgotten_and_may_come_again() -> None:
    answered = asyncio.Event()

    async def ask(asked: RelayedRequest) -> Answer:
        await answered.wait()
        return MOVED

    prefills = Prefills(ask, 4096, 5.0)
    task = asyncio.ensure_future(prefills.prepared(request(), LONG))
    await asyncio.sleep(0.01)
    # It leaves in the very tick in which the answer is there.
    answered.set()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await prefills.prepared(request(), LONG))[1] == "moved"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'{"prompt": "kv_transfer_params is a key"}', False),
        (b'{"prompt": "a\\u00e9"}', False),
        (b'{"kv_transfer_params": {}}', True),
        (b'{"kv_transfer_params": null}', True),
        (b'{"kv_transfer\\u005fparams": 0}', True),
        (b'{"vllm_xargs": {"kv_transfer_params": 0}}', True),
        (b'{"sampling_params": {"extra_args": {"kv_transfer_params": ""}}}', True),
        (b'{"kv_transfer_params": 1, "kv_transfer_params": 2, "x": NaN}', True),
        ('{"kv_transfer_params": 1}'.encode("utf-16"), True),
        ('{"prompt": "a"}'.encode("utf-16"), False),
        (b"--form\r\nkv_transfer_params", True),
        (b"", False),
    ],
)
def test_clients_say_nothing_of_kv(body: bytes, named: bool) -> None:
    assert names_kv(RelayedRequest("POST", "/v1/completions", (), body)) is named


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
