"""One session id, sent with different cache salts and adapters: these are different programs and sessions."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_agentserve.policy.attribution import Attribution
from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.hints import Hints
from vllm_agentserve.policy.program import identifier


def call(session: str | None = "s", salt: str | None = None, adapter: str | None = None, **hints: Any) -> Call:
    request = SimpleNamespace(
        request_id="r",
        session_id=session,
        cache_salt=salt,
        lora_request=adapter and SimpleNamespace(lora_name=adapter),
        block_hashes=[],
        prompt_token_ids=[1, 2, 3],
    )
    return Call(request, Hints(**hints))


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


def test_no_session_id_looks_like_one_of_a_tenant() -> None:
    attribution = Attribution(16)
    of_tenant = key(attribution, "s", "salt")
    assert key(attribution, of_tenant) != of_tenant
    assert key(attribution, of_tenant.removeprefix("session ")) != of_tenant


def test_sessions_are_known_by_tenant() -> None:
    assert call("s").session == "s"
    assert call(None, "salt").session is None
    assert len({call("s", salt, adapter).session for salt, adapter in TENANTS}) == len(TENANTS)
