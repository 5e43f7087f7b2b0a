"""One session id, sent with different cache salts and adapters: these are different programs and sessions."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_agentserve.policy.attribution import Attribution
from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.clients import client_hints
from vllm_agentserve.policy.hints import Hints, read_hints
from vllm_agentserve.policy.program import bounded, identifier


def call(
    session_id: str | None = "s",
    salt: str | None = None,
    adapter: str | None = None,
    name: str = "r",
    said: Hints | None = None,
    **hints: Any,
) -> Call:
    request = SimpleNamespace(
        request_id=name,
        session_id=session_id,
        cache_salt=salt,
        lora_request=adapter and SimpleNamespace(lora_name=adapter),
        block_hashes=[],
        prompt_token_ids=[1, 2, 3],
        all_token_ids=[1, 2, 3, 4],
        num_prompt_tokens=3,
        num_output_tokens=1,
    )
    return Call(request, said or Hints(**hints))


def key(attribution: Attribution, *given: Any, **named: Any) -> str:
    return attribution.owner(call(*given, **named)).key


TENANTS = [(None, None), ("salt", None), ("other", None), (None, "adapter"), ("salt", "adapter"), (None, "salt")]


@pytest.mark.parametrize("hints", [{}, {"parent": "root"}, {"thread": "t"}], ids=str)
@pytest.mark.parametrize("session", ["s", None])
def test_each_tenant_has_a_program_of_its_own(session: str | None, hints: dict[str, Any]) -> None:
    attribution = Attribution(16)
    if session is None and "parent" not in hints:
        return
    keys = [key(attribution, session, salt, adapter, **hints) for salt, adapter in TENANTS]
    assert len(set(keys)) == len(TENANTS)
    assert keys == [key(attribution, session, salt, adapter, **hints) for salt, adapter in TENANTS]
    assert len({identifier(one) for one in keys}) == len(TENANTS)


def test_a_parent_that_one_tenant_names_is_none_of_another() -> None:
    attribution = Attribution(16)
    key(attribution, "child", "salt", parent="root")
    assert key(attribution, "child") == "session child"
    assert key(attribution, "child", "salt") == key(attribution, "root", "salt") != key(attribution, "root")


@pytest.mark.parametrize("salted", [False, True])
def test_names_of_clients_and_gateways_are_names_of_a_tenant(salted: bool) -> None:
    headers = {"x-session-affinity": "s", "x-parent-session-id": "root"}
    said, errors = read_hints(client_hints(headers, {}))
    gateway, _ = read_hints({"agentic_context": {"task_id": "t", "agent_id": "a"}})
    assert (said.session, said.parent, errors) == ("s", "root", [])
    for hints in (said, gateway):
        attribution = Attribution(16)
        order = TENANTS[::-1] if salted else TENANTS
        owners = [attribution.owner(call(None, salt, adapter, said=hints)) for salt, adapter in order]
        assert len({owner.key for owner in owners}) == len(TENANTS)
        # It is a sub-agent of a program of the same tenant.
        roots = [key(attribution, hints.parent, salt, adapter) for salt, adapter in order]
        assert [owner.key for owner in owners] == roots
        assert all(owner.sub_agent and owner.thread == hints.session for owner in owners)
        assert len({call(None, salt, adapter, said=hints).session for salt, adapter in TENANTS}) == len(TENANTS)


def test_a_session_that_a_hint_names_is_in_its_tenant() -> None:
    attribution = Attribution(16)
    named = key(attribution, "router", "salt", session="s")
    assert named == key(attribution, "s", "salt") != key(attribution, "s")
    assert named != key(attribution, "router", "salt")
    assert call("router", "salt", session="s").session == call("s", "salt").session != call("s").session


def test_a_response_is_gone_on_from_by_its_own_tenant_only() -> None:
    attribution = Attribution(16)
    first = call(None, "salt", name="resp_a-1")
    first.owner = attribution.owner(first)
    attribution.remember(first, 1.0, 1)
    assert key(attribution, None, "salt", previous="resp_a") == first.owner.key
    for salt, adapter in TENANTS:
        if (salt, adapter) != ("salt", None):
            assert key(attribution, None, salt, adapter, name="next", previous="resp_a") == "request next"


def test_no_session_id_looks_like_one_of_a_tenant() -> None:
    attribution = Attribution(16)
    of_tenant = key(attribution, "s", "salt")
    assert key(attribution, of_tenant) != of_tenant
    assert key(attribution, of_tenant.removeprefix("session ")) != of_tenant


def test_sessions_are_known_by_tenant() -> None:
    assert call("s").session == "s"
    assert call(None, "salt").session is None
    assert len({call("s", salt, adapter).session for salt, adapter in TENANTS}) == len(TENANTS)


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "given",
    [{"session_id": LONG}, {"salt": LONG}, {"adapter": LONG}, {"session_id": None, "name": LONG}],
    ids=["session", "salt", "adapter", "request"],
)
def test_what_is_kept_of_a_long_name_is_short(given: dict[str, Any]) -> None:
    """A program is kept for an hour after its last call. vLLM itself bounds cache salts only."""
    attribution = Attribution(16)
    assert len(key(attribution, **given)) < 1000
    assert len(call(**given).session or "") < 1000
    assert key(attribution, **given) == key(attribution, **given)
    assert key(attribution, **{name: value and value + "y" for name, value in given.items()}) != key(
        attribution, **given
    )


def test_the_number_of_a_program_with_a_long_name_can_be_found_by_that_name() -> None:
    assert identifier(key(Attribution(16), LONG)) == identifier(bounded(LONG))
    assert bounded("x" * 256) == "x" * 256
