"""Names that agents, their clients and gateways give in forms of their own, read as hints of ours.

Of one request one form is read, the first in this order, and forms are never mixed:

1. `vllm_xargs.agentic_context`, the contract of vLLM Router (`policy/gateway.py`);
2. `agent_hint`, in the body or in `vllm_xargs`;
3. ours: `session_id` in the body or in `vllm_xargs`, `agent_session`, `agent_parent`, `agent_thread`;
4. headers of Claude Code, of Codex, of Dynamo;
5. `X-Session-ID`, which vLLM reads itself, with `X-Parent-Session-ID`; `X-Session-Affinity` in its place;
6. `metadata.user_id` with a session in it, as Claude Code writes it;
7. `prompt_cache_key`, if it is an identifier;
8. `previous_response_id`.

Names of different forms never meet: each begins with its form (`claude-code:`), but for those of 3 and 5.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from vllm_agentserve.policy.gateway import LONGEST_NAME, composed
from vllm_agentserve.policy.hints import INVALID_HEADER, name

OURS = ("session_id", "agent_session", "agent_parent", "agent_thread")
"""Names in `vllm_xargs` that say whose a request is."""
SESSION_IN_USER = re.compile(r"_session_([0-9A-Za-z-]{8,64})$")
"""In `metadata.user_id`: `user_<hash>_account_<id>_session_<id>`."""
IDENTIFIER = re.compile(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}|ses_[0-9A-Za-z]{16,}", re.IGNORECASE)
"""A `prompt_cache_key` that names one conversation. Any other may be shared by many."""
HEADERS = frozenset(
    {
        *("x-claude-code-session-id", "x-claude-code-agent-id", "x-claude-code-parent-agent-id"),
        *("session-id", "session_id", "thread-id", "thread_id", "x-codex-parent-thread-id"),
        *("x-dynamo-session-id", "x-dynamo-parent-session-id", "x-dynamo-session-final"),
        *("x-session-id", "x-parent-session-id", "x-session-affinity"),
    }
)
"""All that are read, in lower case."""
BODY_FIELDS = ("agentic_context", "agent_hint", "prompt_cache_key", "user_id", "previous_response_id")
"""Fields of a body, at whatever depth, without which only headers matter."""


class InvalidHeaderError(ValueError):
    """A header that cannot be a name."""


class Headers:
    """The headers of a request that are read, each checked when it is asked for."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = given

    def read(self, *names: str) -> str | None:
        """The first of these that is there and not empty.

        Raises:
            InvalidHeaderError: it cannot be a name.
        """
        for key in names:
            value = self._given.get(key)
            if value:
                if name(value) is None:
                    raise InvalidHeaderError(f"{key}: {value[: LONGEST_NAME + 1]}")
                return value
        return None


def claude_code(headers: Headers) -> dict[str, Any]:
    """A session is one program, and a sub-agent is one of its threads, however deep."""
    session, agent = headers.read("x-claude-code-session-id"), headers.read("x-claude-code-agent-id")
    if session is None:
        return {}
    program = composed("claude-code", session)
    if agent is None:
        return {"agent_session": program}
    return {"agent_session": composed("claude-code", session, agent), "agent_parent": program}


def codex(headers: Headers) -> dict[str, Any]:
    """A session is one program; its threads are sub-agents where they have ids of their own."""
    session, thread = headers.read("session-id", "session_id"), headers.read("thread-id", "thread_id")
    parent = headers.read("x-codex-parent-thread-id")
    if session is not None and thread is not None and session != thread:
        return {"agent_session": composed("codex", session, thread), "agent_parent": composed("codex", session)}
    known = session or thread
    if known is None:
        return {}
    found = {"agent_session": composed("codex", known)}
    return found if parent in (None, known) else found | {"agent_parent": composed("codex", str(parent))}


def dynamo(headers: Headers) -> dict[str, Any]:
    session, parent = headers.read("x-dynamo-session-id"), headers.read("x-dynamo-parent-session-id")
    if session is None:
        return {}
    found: dict[str, Any] = {"agent_session": composed("dynamo", session)}
    if parent not in (None, session):
        found["agent_parent"] = composed("dynamo", str(parent))
    if headers.read("x-dynamo-session-final") == "true":
        found["agent_last"] = True
    return found


def session_headers(headers: Headers) -> dict[str, Any]:
    """`X-Session-ID` is left to vLLM: its name is the program's as it is."""
    session, affinity = headers.read("x-session-id"), headers.read("x-session-affinity")
    parent = headers.read("x-parent-session-id")
    known = session or affinity
    if known is None:
        return {}
    found = {} if session is not None else {"agent_session": str(affinity)}
    return found if parent in (None, known) else found | {"agent_parent": str(parent)}


FAMILIES: tuple[Callable[[Headers], dict[str, Any]], ...] = (claude_code, codex, dynamo, session_headers)


def client_hints(headers: Mapping[str, str], body: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be added to the `vllm_xargs` of a request.

    Args:
        headers: by name in lower case.
        body: its fields `agent_hint`, `metadata`, `previous_response_id`, `prompt_cache_key`, `session_id` and `vllm_xargs`, as
            far as they are there.
    """
    arguments = body.get("vllm_xargs") or {}
    context = arguments.get("agentic_context")
    if context is not None:
        return {} if isinstance(context, str) else {"agentic_context": json.dumps(context)}
    hint = arguments.get("agent_hint", body.get("agent_hint"))
    if hint is not None:
        return {"agent_hint": hint if isinstance(hint, str) else json.dumps(hint)}
    if body.get("session_id") or any(arguments.get(key) is not None for key in OURS):
        return {}
    known = Headers(headers)
    try:
        for family in FAMILIES:
            found = family(known)
            if found:
                return found
        if known.read("x-session-id"):
            return {}
    except InvalidHeaderError as error:
        return {INVALID_HEADER: str(error)}
    return body_hints(body)


def body_hints(body: Mapping[str, Any]) -> dict[str, Any]:
    """Names in fields of the body that other services have given a meaning."""
    metadata, key, previous = body.get("metadata"), body.get("prompt_cache_key"), body.get("previous_response_id")
    session = session_of_user(metadata.get("user_id")) if isinstance(metadata, Mapping) else None
    if session is not None:
        return {"agent_session": composed("claude-code", session)}
    if isinstance(key, str) and IDENTIFIER.fullmatch(key):
        return {"agent_session": composed("prompt_cache_key", key)}
    return {"agent_previous": previous} if isinstance(previous, str) and previous else {}


def session_of_user(user: Any) -> str | None:
    """The session in a `metadata.user_id`; None if it names a user only, who has many."""
    if not isinstance(user, str) or len(user) > 1024:
        return None
    found = SESSION_IN_USER.search(user)
    if found is not None:
        return found[1]
    if user.startswith("{"):
        try:
            session = json.loads(user).get("session_id")
        except (ValueError, RecursionError):
            return None
        return name(session)
    return None
