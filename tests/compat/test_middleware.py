"""The middleware in front of vLLM's own request classes, and the arguments that bring it there."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from vllm_agentserve import middleware
from vllm_agentserve.middleware import ClientNames, with_names
from vllm_agentserve.scheduler.vllm_hooks import MIDDLEWARE, VllmHooks
from vllm_agentserve.vllm_compat import hooks

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi é \U0001f600"}], "temperature": 0.25}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: ChatCompletionRequest, raw_request: Request) -> dict[str, Any]:
        return {
            "session": GenerateBaseServing._get_session_id(request, raw_request),
            "xargs": request.vllm_xargs,
            "content": request.messages[0]["content"],
        }

    @app.post("/v1/messages")
    async def messages(request: AnthropicMessagesRequest) -> dict[str, Any]:
        return {"xargs": request.vllm_xargs}

    @app.post("/other")
    async def other(raw_request: Request) -> dict[str, Any]:
        return {"body": (await raw_request.body()).decode()}

    app.add_middleware(ClientNames)
    return TestClient(app)


def post(client: TestClient, path: str = "/v1/chat/completions", headers: Any = None, **fields: Any) -> dict[str, Any]:
    answer = client.post(path, json=CHAT | fields, headers=headers)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_the_contract_of_the_gateway_reaches_the_engine(client: TestClient) -> None:
    """vLLM refuses an object in `vllm_xargs`, with status 422 and a page of types."""
    found = post(client, vllm_xargs={"agentic_context": {"program_id": "p"}, "other": 5})
    assert found["xargs"] == {"agentic_context": '{"program_id": "p"}', "other": 5}
    assert found["content"] == CHAT["messages"][0]["content"]


def test_headers_become_hints(client: TestClient) -> None:
    found = post(client, headers={"X-Claude-Code-Session-Id": "s", "X-Claude-Code-Agent-Id": "a"})
    assert found["xargs"] == {"agent_session": "claude-code:s/a", "agent_parent": "claude-code:s"}


def test_vllms_own_header_stays_its_own(client: TestClient) -> None:
    found = post(client, headers={"X-Session-ID": "s"})
    assert (found["session"], found["xargs"]) == ("s", None)


def test_the_messages_api_carries_them_too(client: TestClient) -> None:
    metadata = {"user_id": "user_1_account_2_session_0199a0c4-22b5-7043"}
    found = post(client, "/v1/messages", max_tokens=5, metadata=metadata)
    assert found["xargs"] == {"agent_session": "claude-code:0199a0c4-22b5-7043"}


def test_other_paths_pass_untouched(client: TestClient) -> None:
    sent = json.dumps({"vllm_xargs": {"agentic_context": {}}})
    answer = client.post("/other", content=sent, headers={"X-Claude-Code-Session-Id": "s"})
    assert answer.json() == {"body": sent}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'{"vllm_xargs": 5}', b'{"a": NaN}', b"\xff\xfe", b'{"a":' + b"[" * 100_000, b"null", b'"x"'],
)
def test_a_body_that_is_no_request_is_left_to_vllm(body: bytes) -> None:
    assert with_names({"x-claude-code-session-id": "s"}, body) == body


@pytest.mark.parametrize(("length", "same"), [(middleware.LONGEST_FIELD, False), (middleware.LONGEST_FIELD + 1, True)])
@pytest.mark.parametrize("field", ["agent_hint", "metadata", "vllm_xargs"])
def test_a_field_that_is_too_large_is_not_parsed(field: str, length: int, same: bool) -> None:
    """A hint of 45 MB took nine seconds, in which the server answered nobody."""
    empty = '{"user_id":""}'
    content = empty.replace('""', '"' + "x" * (length - len(empty)) + '"')
    assert len(content) == length
    body = b'{"%s":%s}' % (field.encode(), content.encode())
    assert (with_names({"x-claude-code-session-id": "s"}, body) is body) == same


def test_of_a_header_that_is_there_twice_the_first_counts(client: TestClient) -> None:
    """So it is for vLLM, which reads the session itself: its own parent is no parent."""
    found = post(client, headers=[("X-Session-ID", "a"), ("X-Session-ID", "b"), ("X-Parent-Session-ID", "b")])
    assert (found["session"], found["xargs"]) == ("a", {"agent_parent": "b"})


def test_a_body_that_names_nothing_is_not_parsed() -> None:
    body = b'{"model":  "m"}'
    assert with_names({}, body) is body


def test_all_other_fields_pass_as_the_bytes_they_are() -> None:
    body = b'{"model":"m","temperature":0.10,"big":12345678901234567890123,"previous_response_id":"resp_1"}'
    assert with_names({}, body).startswith(body[:-1])


async def test_a_body_in_parts_is_one_and_a_disconnect_is_passed_on() -> None:
    sent = [b'{"model": "m", "agent_hint"', b': {"session_id": "s"}}']
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in sent]
    messages += [{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}]
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive()])

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        return

    await ClientNames(app)({"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}, receive, send)
    assert json.loads(seen[0]["body"])["vllm_xargs"] == {"agent_hint": '{"session_id": "s"}'}
    assert seen[1] == {"type": "http.disconnect"}


async def test_a_body_that_is_too_large_passes_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "LONGEST_BODY", 10)
    messages = [{"type": "http.request", "body": b"12345678", "more_body": True} for _ in range(5)]
    given = list(messages)

    async def receive() -> Any:
        return given.pop(0)

    body = middleware.RewrittenBody({}, receive)
    assert [await body.receive() for _ in range(5)] == messages


async def test_nothing_is_read_before_the_application_asks() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        return

    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        return

    await ClientNames(app)({"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}, receive, send)


@pytest.mark.parametrize(
    ("scheduler", "config", "given", "expected"),
    [
        ("vllm_agentserve.AgentScheduler", None, [], [MIDDLEWARE]),
        ("vllm_agentserve.AgentScheduler", None, ["a.b"], ["a.b", MIDDLEWARE]),
        ("vllm_agentserve.AgentScheduler", None, [MIDDLEWARE], [MIDDLEWARE]),
        ("vllm_agentserve.AgentScheduler", {"agentserve": {"client_names": False}}, [], []),
        ("vllm_agentserve.AgentScheduler", {"agentserve": {"wrong": 1}}, [], []),
        (None, None, [], []),
        ("other.Scheduler", None, [], []),
    ],
)
def test_the_server_gets_it_where_our_scheduler_is_chosen(
    scheduler: Any, config: Any, given: Any, expected: Any, tmp_path: Path
) -> None:
    hooks.add_middleware(VllmHooks)
    hooks.add_middleware(VllmHooks)
    args = Namespace(model=str(tmp_path), scheduler_cls=scheduler, additional_config=config or {}, middleware=given)
    made = EngineArgs.from_cli_args(args)
    assert made.scheduler_cls == scheduler
    assert args.middleware == expected


def test_arguments_without_a_server_are_left_alone(tmp_path: Path) -> None:
    hooks.add_middleware(VllmHooks)
    args = Namespace(model=str(tmp_path), scheduler_cls="vllm_agentserve.AgentScheduler")
    EngineArgs.from_cli_args(args)
    assert not hasattr(args, "middleware")
