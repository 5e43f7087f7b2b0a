"""What a client may say of a request beside its session: optional, checked, bounded, and never more than a hint.

Hints travel in vLLM's own `vllm_xargs`. Each is checked by itself: a wrong one is ignored, the others hold. A hint can only
order a client's request among those of its class and the level of its program; who waits too long goes first whatever
others say, so a client that lies delays others by no more than `max_bypass_steps`. With `kv_reserve_share` critical calls keep
others from KV blocks as well, for no longer than that either, and the contexts of their programs take the room of others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_agentserve.policy.gateway import FIELDS, FORMS, NAME, WHOLE, is_count, is_name, read_gateway

LONGEST_DEADLINE_MS = 86_400_000.0
"""A day."""
MOST_ERRORS = 8
"""After so many wrong ones the others are not read."""
LONGEST_SHOWN = 40
"""Characters of a wrong value that a message repeats."""
CLASSES = ("interactive", "batch")
CRITICAL = 1 << 32
"""More than the difference of any two priorities."""


@dataclass(frozen=True)
class Hints:
    """What was said, as far as it is right.

    Args:
        parent: session id of the program that started this one.
        thread: which of the program's threads the call continues.
        deadline_ms: the call should be through so long after it came.
        batch: whether nobody waits for the answer: every interactive call goes first.
        last: whether the program ends with the call.
        tool: what the program does after the call, until its next one.
        session: the program, in place of the `session_id` that vLLM reads.
        previous: id of the response that the request goes on from.
        priority: the larger one goes first among calls of one class and level.
        critical: whether it goes before all that are not, among calls of one class and level, whatever their priority.
    """

    parent: str | None = None
    thread: str | None = None
    deadline_ms: float | None = None
    batch: bool = False
    last: bool = False
    tool: str | None = None
    session: str | None = None
    previous: str | None = None
    priority: int = 0
    critical: bool = False

    @property
    def precedence(self) -> int:
        """The larger one goes first among calls of one class and level: critical ones, then by priority."""
        return self.priority + (CRITICAL if self.critical else 0)


@dataclass(frozen=True)
class HintError:
    """A hint that cannot be used: its name, what was given (shortened), and what is allowed."""

    name: str
    given: str
    allowed: str

    def __str__(self) -> str:
        place = self.name if self.name.startswith(HEADER) else f"vllm_xargs[{self.name!r}]"
        return f"{place} = {self.given} is not allowed: it must be {self.allowed}"


def name(value: Any) -> str | None:
    return value if is_name(value) else None


def deadline(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 < value <= LONGEST_DEADLINE_MS else None


def is_batch(value: Any) -> bool | None:
    return CLASSES.index(value) == 1 if isinstance(value, str) and value in CLASSES else None


def truth(value: Any) -> bool | None:
    return bool(value) if isinstance(value, (bool, int)) and value in (0, 1) else None


def count(value: Any) -> int | None:
    return value if is_count(value) else None


KNOWN: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "agent_parent": ("parent", name, NAME),
    "agent_thread": ("thread", name, NAME),
    "agent_deadline_ms": ("deadline_ms", deadline, f"a number above 0, at most {LONGEST_DEADLINE_MS:.0f}"),
    "agent_last": ("last", truth, "true or false"),
    "agent_tool": ("tool", name, NAME),
    "agent_class": ("batch", is_batch, " or ".join(repr(one) for one in CLASSES)),
    "agent_session": ("session", name, NAME),
    "agent_previous": ("previous", name, NAME),
    "agent_priority": ("priority", count, WHOLE),
    "agent_critical": ("critical", truth, "true or false"),
}
"""By name in `vllm_xargs`: the field, what reads it (None where it is wrong), and what is allowed."""
PREFIX = "agent_"
INVALID_HEADER = "agent_invalid_header"
"""By this name the API server's middleware passes a header on that cannot be used, as `name: value`."""
HEADER = "header "
LOGGED = KNOWN.keys() | FORMS.keys() | FIELDS
"""Names whose errors are logged each once."""
IDENTITY = ("session", "parent", "thread", "previous")
"""Fields that say whose a request is."""
NONE = Hints()


def read_hints(given: Mapping[str, Any] | None) -> tuple[Hints, list[HintError]]:
    """The hints among a request's extra arguments, a gateway's object included, and what is wrong with the others.

    A name that begins with `agent_` and is none of ours is wrong too: it is a misspelt hint. All other arguments are somebody
    else's.
    """
    if not given:
        return NONE, []
    found: dict[str, Any] = {}
    errors: list[HintError] = []
    for key, value in given.items():
        if not isinstance(key, str) or not key.startswith(PREFIX) or key in FORMS:
            continue
        if len(errors) == MOST_ERRORS:
            break
        if key == INVALID_HEADER:
            header, _, content = str(value).partition(": ")
            errors.append(HintError(HEADER + header[:LONGEST_SHOWN], shortened(content), NAME))
            continue
        if key not in KNOWN:
            errors.append(HintError(key[:LONGEST_SHOWN], shortened(value), f"named {', '.join(KNOWN)}"))
            continue
        field, read, allowed = KNOWN[key]
        right = read(value)
        if right is None:
            errors.append(HintError(key, shortened(value), allowed))
        else:
            found[field] = right
    form = next((form for form in FORMS if given.get(form) is not None), None)
    if form is not None:
        # One form says whose a request is, and nothing is taken from another.
        said, faults = read_gateway(form, given[form])
        found = {key: value for key, value in found.items() if key not in IDENTITY} | said
        errors += [HintError(name, shortened(value), allowed) for name, value, allowed in faults]
    return (Hints(**found) if found else NONE), errors[:MOST_ERRORS]


def shortened(value: Any) -> str:
    """A value as it may stand in a message: on one line, and bounded however large it is."""
    if isinstance(value, str):
        return repr(value) if len(value) <= LONGEST_SHOWN else repr(value[:LONGEST_SHOWN]) + "..."
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a huge number"
    return repr(value) if isinstance(value, (bool, int, float, type(None))) else f"a {type(value).__name__}"
