"""Whose a request is: the ingress reads it as the engine behind does."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_agentserve.cluster.caller import NOBODY, Caller, read_caller
from vllm_agentserve.middleware import ClientNames
from vllm_agentserve.policy.hints import read_hints
from vllm_agentserve.policy.program import bounded

CHAT = "/v1/chat/completions"
UUID = "12345678-1234-1234-1234-1234567890ab"


def caller(body: dict[str, Any], path: str = CHAT, client_names: bool = True, **headers: str) -> Caller:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return read_caller(path, named, json.dumps(body).encode(), client_names)


@pytest.mark.parametrize(
    ("headers", "body", "session", "parent"),
    [
        ({}, {}, "", None),
        ({"x_session_id": "a"}, {}, "a", None),
        ({}, {"session_id": "a"}, "a", None),
        ({"x_session_id": "b"}, {"session_id": "a"}, "a", None),
        ({}, {"vllm_xargs": {"session_id": "a"}}, "a", None),
        ({}, {"vllm_xargs": {"agent_session": "a", "agent_parent": "p"}}, "a", "p"),
        ({"x_session_id": "a", "x_parent_session_id": "p"}, {}, "a", "p"),
        ({"x_claude_code_session_id": "s"}, {}, "claude-code:s", None),
        ({"x_claude_code_session_id": "s", "x_claude_code_agent_id": "1"}, {}, "claude-code:s/1", "claude-code:s"),
        ({"session_id": "s"}, {}, "codex:s", None),
        ({"x_session_affinity": "a"}, {}, "a", None),
        ({}, {"vllm_xargs": {"agentic_context": {"program_id": "t"}}}, "agentic:t", None),
        ({}, {"agent_hint": {"session_id": "t", "parent_session_id": "p"}}, "agentic:t", "agentic:p"),
        ({}, {"metadata": {"user_id": "user_1_account_2_session_12345678-90ab"}}, "claude-code:12345678-90ab", None),
        ({}, {"prompt_cache_key": UUID}, f"prompt_cache_key:{UUID}", None),
        ({"x_claude_code_session_id": "bad\x01"}, {}, "", None),
        ({}, {"session_id": 7}, "", None),
        ({}, {"session_id": ["a"]}, "", None),
        ({}, {"vllm_xargs": "no object"}, "", None),
    ],
)  # fmt: skip
def test_names_of_all_forms(headers: dict[str, str], body: dict[str, Any], session: str, parent: str | None) -> None:
    found = caller(body | {"messages": []}, **headers)
    assert (found.session, found.parent) == (session, parent)


def test_an_engine_that_does_not_read_names_of_clients_does_not_pin_by_them() -> None:
    assert caller({}, client_names=False, x_claude_code_session_id="s") == Caller(characters=0)
    assert caller({}, client_names=False, x_session_id="s").session == "s"


def test_a_huge_session_id_is_bounded_as_the_scheduler_does() -> None:
    assert caller({"session_id": "x" * 100_000}).session == bounded("x" * 100_000)


def test_the_last_call_says_so() -> None:
    assert caller({"session_id": "a", "vllm_xargs": {"agent_last": True}}).last
    assert not caller({"session_id": "a"}).last


def test_the_interface_of_messages_has_no_session_in_its_body() -> None:
    assert caller({"session_id": "a"}, path="/v1/messages").session == ""
    assert caller({}, path="/v1/messages", x_session_id="a").session == "a"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"session_id": nul}', b"[" * 100_000, b"\xff\xfe"])
def test_what_is_no_body_is_nobodys(body: bytes) -> None:
    assert read_caller(CHAT, {"x-session-id": "a"}, body) == NOBODY


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/tokenize", "/"])
def test_other_pages_are_nobodys(path: str) -> None:
    assert read_caller(path, {"x-session-id": "a"}, b"{}") == NOBODY


def test_tokens_of_a_prompt() -> None:
    assert caller({"prompt": list(range(100))}).prompt_tokens(0.25) == 100
    assert caller({"prompt": [[1, 2, 3], [4, 5]]}).tokens == 5
    text = "word " * 80
    assert caller({"prompt": text}).prompt_tokens(0.25) == round(len(json.dumps(text)) / 4)
    messages = [{"role": "user", "content": "x" * 1000}]
    found = caller({"messages": messages, "model": "y" * 5000})
    assert (found.characters, found.tokens) == (len(json.dumps(messages)), 0)


NAMES = st.one_of(st.text(max_size=12), st.integers(), st.none(), st.just("x" * 300))


@given(
    headers=st.dictionaries(
        st.sampled_from(
            ["x-session-id", "x-claude-code-session-id", "session-id", "x-dynamo-session-id", "x-session-affinity"]
        ),
        st.text(st.characters(max_codepoint=255), max_size=12),
    ),
    fields=st.dictionaries(st.sampled_from(["session_id", "prompt_cache_key", "previous_response_id"]), NAMES),
    arguments=st.one_of(
        st.none(),
        st.dictionaries(st.sampled_from(["session_id", "agent_session", "agent_parent", "agent_hint", "other"]), NAMES),
    ),
)
async def test_the_session_is_the_one_that_the_engine_finds(
    headers: dict[str, str], fields: dict[str, Any], arguments: dict[str, Any] | None
) -> None:
    """Against the API server's own middleware, and vLLM's order of looking for a session."""
    body = json.dumps(fields | ({} if arguments is None else {"vllm_xargs": arguments})).encode()
    seen: list[bytes] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append((await receive())["body"])

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": raw}
    await ClientNames(application)(scope, receive, receive)  # type: ignore[arg-type]
    sent = json.loads(seen[0])
    hints, _ = read_hints(sent.get("vllm_xargs"))
    given_session = next(
        (
            one
            for one in (sent.get("session_id"), headers.get("x-session-id"), (sent.get("vllm_xargs") or {}).get("session_id"))
            if isinstance(one, str) and one
        ),
        "",
    )  # fmt: skip
    assert read_caller(CHAT, headers, body).session == bounded(hints.session or given_session)
