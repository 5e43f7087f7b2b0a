"""What a gateway says of a request: `agentic_context`, the contract of vLLM Router, and its shorter form `agent_hint`.

Both are objects. vLLM's `vllm_xargs` holds none, so there they are texts of JSON; the API server's middleware makes them so.
Fields that are not named here are somebody else's.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

LONGEST_CONTEXT = 8192
"""Characters of the JSON text."""
LONGEST_NAME = 256
"""Characters of a name at most, as everywhere."""
LONGEST_S = 86_400
"""A day."""


def composed(form: str, *parts: str) -> str:
    """One name of several, which no other parts give: `form:part/part`."""
    return f"{form}:{'/'.join(part.replace('%', '%25').replace('/', '%2F') for part in parts)}"


def is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


def is_truth(value: Any) -> bool:
    return isinstance(value, bool)


def is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= LONGEST_S


def is_duration(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LONGEST_S


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31


NAME = f"a string of 1 to {LONGEST_NAME} printable characters"
TRUTH = "true or false"
WHOLE = "a whole number"
Check = tuple[Callable[[Any], bool], str]
CONTEXT: dict[str, Check] = {
    **dict.fromkeys(("program_id", "task_id", "session_id", "agent_id"), (is_name, NAME)),
    **dict.fromkeys(("parent_program_id", "root_program_id", "parent_agent_id", "agent_role"), (is_name, NAME)),
    **dict.fromkeys(("blocks_parent", "expected_resume"), (is_truth, TRUTH)),
    "deadline_seconds": (is_time, f"a number of seconds above 0, at most {LONGEST_S}"),
    "kv_retention_ttl_seconds": (is_duration, f"a number of seconds from 0 to {LONGEST_S}"),
    "priority": (is_count, WHOLE),
    "expected_output_length": (is_count, WHOLE),
}
"""Fields of `agentic_context`: what is right, and how a message says it."""
AGENT_HINT: dict[str, Check] = {
    **dict.fromkeys(("session_id", "parent_session_id"), (is_name, NAME)),
    **dict.fromkeys(("blocks_parent", "expected_resume"), (is_truth, TRUTH)),
}
FORMS = {"agentic_context": CONTEXT, "agent_hint": AGENT_HINT}
FIELDS = frozenset(f"{form}.{key}" for form, fields in FORMS.items() for key in fields)
"""All fields that an error can name."""
Fault = tuple[str, Any, str]
"""What is wrong: its name, what was given, and what is allowed."""


def read_gateway(form: str, given: Any) -> tuple[dict[str, Any], list[Fault]]:
    """The fields of our hints that a gateway's object says, and what is wrong with the others.

    Args:
        form: a key of `FORMS`.
        given: the object, or its JSON text.
    """
    allowed = f"an object, or its JSON text of at most {LONGEST_CONTEXT} characters"
    if isinstance(given, str):
        if len(given) > LONGEST_CONTEXT:
            return {}, [(form, given, allowed)]
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return {}, [(form, given, allowed)]
    if not isinstance(given, Mapping):
        return {}, [(form, given, allowed)]
    right: dict[str, Any] = {}
    faults: list[Fault] = []
    for key, (fits, text) in FORMS[form].items():
        value = given.get(key)
        if value is None:
            continue
        if fits(value):
            right[key] = value
        else:
            faults.append((f"{form}.{key}", value, text))
    found, more = identity(right) if form == "agentic_context" else hint_identity(right)
    for program in ("session", "parent"):
        if program in found and not is_name(found[program]):
            faults.append((form, found.pop(program), f"made of names that have {LONGEST_NAME} characters together"))
    if right.get("expected_resume") is False:
        found["last"] = True
    if "deadline_seconds" in right:
        found["deadline_ms"] = right["deadline_seconds"] * 1000.0
    if "priority" in right:
        found["priority"] = right["priority"]
    if right.get("blocks_parent") and "parent" not in found:
        more.append((f"{form}.blocks_parent", True, "given together with the parent that it blocks"))
    return found, faults + more


def identity(right: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """Program and parent: named as such, or made of task and agent. An agent that is not the lead of its task is a sub-agent."""
    task, agent = right.get("task_id", right.get("session_id")), right.get("agent_id")
    lead = None if task is None else composed("agentic", task)
    below = agent is not None and right.get("agent_role") != "lead"
    if "program_id" in right:
        program: str | None = composed("agentic", right["program_id"])
    elif task is None:
        wrong = (
            []
            if agent is None
            else [("agentic_context.agent_id", agent, "given with program_id, task_id or session_id")]
        )
        return {}, wrong
    else:
        program = composed("agentic", task, str(agent)) if below else lead
    parent = None
    if "root_program_id" in right or "parent_program_id" in right:
        parent = composed("agentic", str(right.get("root_program_id", right.get("parent_program_id"))))
    elif right.get("parent_agent_id") is not None or below or right.get("agent_role") == "subagent":
        # Every agent of a task has the same root: the lead.
        parent = lead
    found: dict[str, Any] = {"session": program}
    return found if parent in (None, program) else found | {"parent": parent}, []


def hint_identity(right: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    session, parent = right.get("session_id"), right.get("parent_session_id")
    found: dict[str, Any] = {} if session is None else {"session": composed("agentic", session)}
    return found if parent in (None, session) else found | {"parent": composed("agentic", str(parent))}, []
