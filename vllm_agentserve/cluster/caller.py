"""Whose a request is, read as the engine behind will read it, so that what is pinned is what its scheduler sees."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_agentserve.middleware import LONGEST_BODY, PATHS, with_names
from vllm_agentserve.policy.clients import HEADERS
from vllm_agentserve.policy.hints import read_hints
from vllm_agentserve.policy.program import bounded

SESSION_HEADER = "x-session-id"
"""The one that vLLM reads itself."""
TEXTS = ("messages", "prompt", "input", "system", "instructions", "tools")
"""Fields of a body that are computed."""
SOME_TOKENS = 1024
"""Token ids at the beginning of a prompt that are looked at to tell them from text."""


@dataclass(frozen=True, slots=True)
class Caller:
    """What a request says of its conversation.

    Args:
        session: its name, as the engine's scheduler will know it; "" if it has none.
        parent: session of the agent that started this one.
        last: whether the conversation ends with this request.
        characters: of the texts in its prompt, as they stand in the body.
        tokens: token ids in its prompt.
    """

    session: str = ""
    parent: str | None = None
    last: bool = False
    characters: int = 0
    tokens: int = 0

    def prompt_tokens(self, per_character: float) -> int:
        """Tokens of the prompt, estimated where it is text."""
        return self.tokens + round(self.characters * per_character)


NOBODY = Caller()


def read_caller(path: str, headers: Mapping[str, str], body: bytes, client_names: bool = True) -> Caller:
    """Whose a request is.

    Args:
        path: of its address.
        headers: by name in lower case; of a header that is there twice the first.
        body: as it came.
        client_names: the engines' option of that name.
    """
    if not path.endswith(PATHS):
        return NOBODY
    if client_names and len(body) <= LONGEST_BODY and headers.get("content-encoding", "identity") == "identity":
        body = with_names({name: value for name, value in headers.items() if name in HEADERS}, body)
    import msgspec

    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        arguments = decoded(fields, "vllm_xargs")
        given = None if path.endswith("/v1/messages") else decoded(fields, "session_id")
    except (ValueError, RecursionError):
        return NOBODY
    arguments = arguments if isinstance(arguments, dict) else {}
    hints, _ = read_hints(arguments)
    session = hints.session or first_name(given, headers.get(SESSION_HEADER), arguments.get("session_id"))
    characters, tokens = sizes(fields)
    return Caller(bounded(session), hints.parent, hints.last, characters, tokens)


def decoded(fields: Mapping[str, Any], name: str) -> Any:
    """A field of a body; None if it is not there. Raises `ValueError` if it is no JSON."""
    import msgspec

    return msgspec.json.decode(fields[name]) if name in fields else None


def first_name(*values: Any) -> str:
    """The first of these that is a text and not empty, as vLLM looks for a session; "" if none is."""
    return next((value for value in values if isinstance(value, str) and value), "")


def sizes(fields: Mapping[str, Any]) -> tuple[int, int]:
    """Characters of text and token ids in the prompt of a body."""
    characters = tokens = 0
    for name in TEXTS:
        if name not in fields:
            continue
        content = memoryview(fields[name])
        if bytes(content[:SOME_TOKENS]).lstrip(b"[ \t\r\n")[:1].isdigit():
            tokens += bytes(content).count(b",") + 1
        else:
            characters += content.nbytes
    return characters, tokens
