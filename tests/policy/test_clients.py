"""Names of sessions as clients and gateways send them: which form is read, what becomes of it, and what is refused."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_agentserve.policy.attribution import MOST_RESPONSES, Attribution
from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.clients import HEADERS, client_hints
from vllm_agentserve.policy.gateway import FORMS, LONGEST_CONTEXT
from vllm_agentserve.policy.hints import MOST_ERRORS, Hints, read_hints

CLAUDE, AGENT = {"x-claude-code-session-id": "s"}, {"x-claude-code-agent-id": "a"}
UUID = "0199a0c4-22b5-7043-b5fc-697ca0fbd5a6"
USER = f"user_0784b260bff170af_account_261d5434-c8c2-431f-b07d-2e480cd4622f_session_{UUID}"


def hints_of(headers: dict[str, str], body: dict[str, Any] | None = None) -> Hints:
    """As a request is read in all: by the API server, then by the engine."""
    body = body or {}
    hints, errors = read_hints((body.get("vllm_xargs") or {}) | client_hints(headers, body))
    assert errors == []
    return hints


@pytest.mark.parametrize(
    ("headers", "hints"),
    [
        (CLAUDE, Hints(session="claude-code:s")),
        (CLAUDE | AGENT, Hints(session="claude-code:s/a", parent="claude-code:s")),
        (
            CLAUDE | AGENT | {"x-claude-code-parent-agent-id": "b"},
            Hints(session="claude-code:s/a", parent="claude-code:s"),
        ),
        (AGENT, Hints()),
        ({"session-id": "s", "thread-id": "s"}, Hints(session="codex:s")),
        ({"session-id": "s", "thread-id": "t"}, Hints(session="codex:s/t", parent="codex:s")),
        ({"session_id": "s", "thread_id": "t"}, Hints(session="codex:s/t", parent="codex:s")),
        ({"session-id": "s"}, Hints(session="codex:s")),
        ({"thread-id": "t", "x-codex-parent-thread-id": "s"}, Hints(session="codex:t", parent="codex:s")),
        ({"x-dynamo-session-id": "s"}, Hints(session="dynamo:s")),
        (
            {"x-dynamo-session-id": "s", "x-dynamo-parent-session-id": "p", "x-dynamo-session-final": "true"},
            Hints(session="dynamo:s", parent="dynamo:p", last=True),
        ),
        ({"x-session-affinity": "s", "x-session-id": "s"}, Hints()),
        ({"x-session-affinity": "s"}, Hints(session="s")),
        ({"x-session-affinity": "s", "x-session-id": "s", "x-parent-session-id": "p"}, Hints(parent="p")),
        ({"x-parent-session-id": "p"}, Hints()),
        ({"x-session-id": "s", "x-parent-session-id": "s"}, Hints()),
        ({"x-claude-code-session-id": ""}, Hints()),
    ],
)
def test_headers_name_program_and_parent(headers: dict[str, str], hints: Hints) -> None:
    assert hints_of(headers) == hints


@pytest.mark.parametrize(
    ("body", "hints"),
    [
        ({"metadata": {"user_id": USER}}, Hints(session=f"claude-code:{UUID}")),
        (
            {"metadata": {"user_id": json.dumps({"device_id": "d", "session_id": UUID})}},
            Hints(session=f"claude-code:{UUID}"),
        ),
        ({"metadata": {"user_id": "somebody"}}, Hints()),
        ({"metadata": {"user_id": "{broken"}}, Hints()),
        ({"metadata": {"user_id": 5}}, Hints()),
        ({"metadata": "text"}, Hints()),
        ({"prompt_cache_key": UUID}, Hints(session=f"prompt_cache_key:{UUID}")),
        ({"prompt_cache_key": "ses_51f2ab09cffeZq8T3v1X"}, Hints(session="prompt_cache_key:ses_51f2ab09cffeZq8T3v1X")),
        ({"prompt_cache_key": "support-bot"}, Hints()),
        ({"previous_response_id": "resp_1"}, Hints(previous="resp_1")),
        ({"agent_hint": {"session_id": "s"}}, Hints(session="agentic:s")),
        ({"agent_hint": {"session_id": "s", "parent_session_id": "p"}}, Hints(session="agentic:s", parent="agentic:p")),
        ({"vllm_xargs": {"agent_hint": '{"session_id": "s"}'}}, Hints(session="agentic:s")),
    ],
)
def test_fields_of_the_body_name_a_program(body: dict[str, Any], hints: Hints) -> None:
    assert hints_of({}, body) == hints


@pytest.mark.parametrize(
    ("context", "hints"),
    [
        ({"program_id": "p"}, Hints(session="agentic:p")),
        ({"program_id": "p", "parent_program_id": "q"}, Hints(session="agentic:p", parent="agentic:q")),
        (
            {"program_id": "p", "parent_program_id": "q", "root_program_id": "r", "blocks_parent": True},
            Hints(session="agentic:p", parent="agentic:r"),
        ),
        ({"program_id": "p", "root_program_id": "p"}, Hints(session="agentic:p")),
        ({"task_id": "t"}, Hints(session="agentic:t")),
        ({"session_id": "t"}, Hints(session="agentic:t")),
        ({"task_id": "t", "session_id": "s"}, Hints(session="agentic:t")),
        ({"task_id": "t", "agent_id": "a"}, Hints(session="agentic:t/a", parent="agentic:t")),
        ({"task_id": "t", "agent_id": "a", "agent_role": "lead"}, Hints(session="agentic:t")),
        (
            {"task_id": "t", "agent_id": "a", "parent_agent_id": "b"},
            Hints(session="agentic:t/a", parent="agentic:t"),
        ),
        ({"program_id": "p", "task_id": "t", "agent_role": "subagent"}, Hints(session="agentic:p", parent="agentic:t")),
        ({"program_id": "p", "expected_resume": False}, Hints(session="agentic:p", last=True)),
        ({"program_id": "p", "expected_resume": True}, Hints(session="agentic:p")),
        ({"program_id": "p", "deadline_seconds": 30}, Hints(session="agentic:p", deadline_ms=30_000.0)),
        (
            {
                "program_id": "p",
                "priority": 10,
                "expected_output_length": 20,
                "kv_retention_ttl_seconds": 5,
                "step_id": [],
            },
            Hints(session="agentic:p", priority=10),
        ),
        ({}, Hints()),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_the_contract_of_the_gateway(context: dict[str, Any], hints: Hints, as_text: bool) -> None:
    given_ = json.dumps(context) if as_text else context
    assert hints_of({}, {"vllm_xargs": {"agentic_context": given_}}) == hints


def test_one_form_is_read_in_this_order_and_none_is_mixed() -> None:
    headers = (
        CLAUDE | AGENT | {"session-id": "c", "thread-id": "t", "x-dynamo-session-id": "d", "x-session-affinity": "x"}
    )
    headers |= {"x-parent-session-id": "xp", "x-dynamo-parent-session-id": "dp"}
    body: dict[str, Any] = {
        "vllm_xargs": {"agentic_context": {"program_id": "p"}, "agent_parent": "ours", "agent_class": "batch"},
        "agent_hint": {"session_id": "h", "parent_session_id": "hp"},
        "session_id": "b",
        "metadata": {"user_id": USER},
        "prompt_cache_key": UUID,
        "previous_response_id": "resp_1",
    }
    assert hints_of(headers, body) == Hints(session="agentic:p", batch=True)
    del body["vllm_xargs"]["agentic_context"]
    assert hints_of(headers, body) == Hints(session="agentic:h", parent="agentic:hp", batch=True)
    del body["agent_hint"]
    assert hints_of(headers, body) == Hints(parent="ours", batch=True)
    del body["vllm_xargs"], body["session_id"]
    assert hints_of(headers, body) == Hints(session="claude-code:s/a", parent="claude-code:s")
    headers = {name: value for name, value in headers.items() if "claude" not in name}
    assert hints_of(headers, body) == Hints(session="codex:c/t", parent="codex:c")
    headers = {name: value for name, value in headers.items() if name not in ("session-id", "thread-id")}
    assert hints_of(headers, body) == Hints(session="dynamo:d", parent="dynamo:dp")
    headers = {name: value for name, value in headers.items() if "dynamo" not in name}
    assert hints_of(headers, body) == Hints(session="x", parent="xp")
    assert hints_of({"x-session-id": "s"}, body) == Hints()
    assert hints_of({}, body) == Hints(session=f"claude-code:{UUID}")
    del body["metadata"]
    assert hints_of({}, body) == Hints(session=f"prompt_cache_key:{UUID}")
    del body["prompt_cache_key"]
    assert hints_of({}, body) == Hints(previous="resp_1")


@pytest.mark.parametrize("key", ["session_id", "agent_session", "agent_parent", "agent_thread"])
def test_who_uses_our_hints_is_read_by_no_header(key: str) -> None:
    assert client_hints(CLAUDE, {"vllm_xargs": {key: "s"}}) == {}


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (
            {"program_id": ""},
            "vllm_xargs['agentic_context.program_id'] = '' is not allowed: it must be a string of 1 to 256 printable characters",
        ),
        ({"program_id": 5}, "vllm_xargs['agentic_context.program_id'] = 5 is"),
        ({"program_id": "p", "parent_program_id": "a\nb"}, "['agentic_context.parent_program_id'] = 'a\\nb' is"),
        (
            {"program_id": "p", "deadline_seconds": -1},
            "= -1 is not allowed: it must be a number of seconds above 0, at most 86400",
        ),
        ({"program_id": "p", "deadline_seconds": float("nan")}, "= nan is"),
        ({"program_id": "p", "expected_resume": 1}, "= 1 is not allowed: it must be true or false"),
        ({"program_id": "p", "blocks_parent": True}, "it must be given together with the parent that it blocks"),
        ({"program_id": "p", "priority": "high"}, "= 'high' is not allowed: it must be a whole number"),
        ({"agent_id": "a"}, "= 'a' is not allowed: it must be given with program_id, task_id or session_id"),
        ({"program_id": "p" * 250}, "it must be made of names that have 256 characters together"),
        ([], "vllm_xargs['agentic_context'] = a list is not allowed: it must be an object, or its JSON text"),
        ("{broken", "it must be an object, or its JSON text of at most 8192 characters"),
        ("[" * 5000, "it must be an object"),
        (" " * (LONGEST_CONTEXT + 1), "it must be an object"),
        (7, "vllm_xargs['agentic_context'] = 7 is"),
    ],
)
def test_what_is_wrong_in_the_contract_is_named(context: Any, message: str) -> None:
    _, errors = read_hints({"agentic_context": context})
    assert len(errors) == 1
    assert message in str(errors[0])


def test_a_header_that_cannot_be_a_name_is_named() -> None:
    hints, errors = read_hints(client_hints({"x-claude-code-session-id": "x" * 300}, {}))
    assert hints == Hints()
    assert [str(error) for error in errors] == [
        f"header x-claude-code-session-id = '{'x' * 40}'... is not allowed: it must be a string of 1 to 256 printable characters"
    ]


def test_names_of_different_forms_and_of_different_parts_never_meet() -> None:
    named = [
        hints_of({}, {"vllm_xargs": {"agentic_context": {"program_id": "s"}}}).session,
        hints_of({"x-claude-code-session-id": "s"}).session,
        hints_of({"x-claude-code-session-id": "s/a"}).session,
        hints_of({"x-claude-code-session-id": "s%2Fa"}).session,
        hints_of(CLAUDE | AGENT).session,
        hints_of({"session-id": "s"}).session,
        hints_of({"x-dynamo-session-id": "s"}).session,
        hints_of({"x-session-affinity": "s"}).session,
    ]
    assert len(set(named)) == len(named)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(sorted({key for form in FORMS.values() for key in form}))
body_fields = st.sampled_from(["agent_hint", "metadata", "previous_response_id", "prompt_cache_key", "session_id"])


@given(
    st.dictionaries(st.sampled_from(sorted(HEADERS)), st.text(max_size=300)),
    st.dictionaries(body_fields, json_like | st.dictionaries(fields, json_like)),
    st.dictionaries(
        st.sampled_from(["agentic_context", "agent_hint", "agent_parent"]),
        json_like | st.dictionaries(fields, json_like),
    ),
)
def test_anything_is_read_or_refused(headers: dict[str, str], body: dict[str, Any], arguments: dict[str, Any]) -> None:
    hints, errors = read_hints(arguments | client_hints(headers, body | {"vllm_xargs": arguments}))
    assert len(errors) <= MOST_ERRORS
    for name in (hints.session, hints.parent, hints.thread, hints.previous):
        assert name is None or (0 < len(name) <= 256 and name.isprintable())
    assert all(len(str(error)) < 500 for error in errors)


# Whose a request is


def called(attribution: Attribution, name: str, hints: Hints, session: str | None = None) -> str:
    request = SimpleNamespace(
        request_id=name,
        session_id=session,
        prompt_token_ids=[],
        block_hashes=[],
        all_token_ids=[1],
        num_prompt_tokens=0,
        num_output_tokens=1,
    )
    call = Call(request, hints=hints)
    call.owner = attribution.owner(call)
    attribution.remember(call, 1.0, 1)
    return call.owner.key


def test_sub_agents_belong_to_the_session_that_started_them() -> None:
    attribution = Attribution(16)
    lead = called(attribution, "1", hints_of(CLAUDE))
    assert called(attribution, "2", hints_of(CLAUDE | AGENT)) == lead
    assert called(attribution, "3", hints_of(CLAUDE | AGENT)) == lead
    assert called(attribution, "4", hints_of({"x-claude-code-session-id": "other"} | AGENT)) != lead


def test_a_gateways_name_goes_before_the_header_that_vllm_reads() -> None:
    attribution = Attribution(16)
    hints = hints_of({"x-session-id": "router"}, {"vllm_xargs": {"agentic_context": {"program_id": "p"}}})
    first = called(attribution, "1", hints, session="router")
    assert first.endswith("agentic:p")
    assert called(attribution, "2", Hints(), session="router") != first


def test_a_response_that_goes_on_from_another_is_its_program() -> None:
    attribution = Attribution(16)
    first = called(attribution, "resp_abc0-1a2b3c4d", Hints())
    assert called(attribution, "resp_abc1-1a2b3c4d", Hints(previous="resp_abc0")) == first
    assert called(attribution, "resp_abc2-1a2b3c4d", Hints(previous="resp_abc1")) == first
    assert called(attribution, "resp_abc3-1a2b3c4d", Hints(previous="resp_none")) != first


def test_responses_are_forgotten() -> None:
    attribution = Attribution(16)
    for number in range(MOST_RESPONSES + 5):
        called(attribution, f"resp_{number}", Hints())
    assert len(attribution._responses) == MOST_RESPONSES
