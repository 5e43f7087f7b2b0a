"""The dialects of recorded traffic, each read into the same lines; which one it is follows from the names of its fields.

- Mooncake, one request a line, as the Mooncake project publishes it (github.com/kvcache-ai/Mooncake, FAST25-release/traces) and
  aiperf reads and writes it: `timestamp` (ms), `input_length`, `output_length` (tokens), `hash_ids` (one per 512 tokens of the
  prompt; equal ids mean equal tokens), `session_id` and `delay` (ms after the answer before). Also under the names
  `created_time`, `input_tokens`, `output_tokens`, `delay_ms`.
- Dynamo's agentic rows (docs.nvidia.com/dynamo, "Agent Simulation"): the same, with `request_id`, `wait_for` (requests that
  must be over before), `tool_wait_ms` (added to `delay`), `branches` (requests that this one has spawned).
- Both may have what gateways record of a request: `priority`, and `blocks_parent` of a request of a spawned session.
- Bailian (github.com/alibaba-edu/qwen-bailian-usagetraces-anon): `timestamp` in seconds, one hash id per 16 tokens, `chat_id`
  and `parent_chat_id`, -1 for the first request of a chat. Chats with thinking are no different: where the application leaves
  the thoughts out of the next prompt, its hash ids do.
- Azure (github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset2023 and 2024): CSV with `TIMESTAMP`, `ContextTokens`,
  `GeneratedTokens`; nothing is shared, nobody continues.
- Weka, also used by AgentX (github.com/callanjfox/kv-cache-tester, docs/trace_replay_tester.md, and aiperf's tutorial "Replaying
  Agentic Coding Sessions with Weka Traces"): one JSON object a session with `block_size` and `requests` of `t` (s), `in`, `out`,
  `hash_ids`, `api_time`, `think_time` (s); entries of `type` "subagent" hold the requests of a sub-agent, for which the
  next request of the parent waits.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from vllm_agentserve.bench.trace_files import Entry

UNITS = {"ms": 1e-3, "s": 1.0}
ALIASES = {
    "timestamp": "created_time",
    "input_length": "input_tokens",
    "output_length": "output_tokens",
}
TEXTS = ("text_input", "input_text", "messages", "prompt")
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
LARGEST_PRIORITY = (1 << 31) - 1


@dataclass(frozen=True)
class TraceLine:
    """One checked request of a trace; times in seconds, `hash_ids` empty where none are given.

    Args:
        number: its place in the trace, from 1.
        where: file and line, for messages.
        delay_s: after the answer before, or after all of `waits`; None where the trace does not say.
        name: by which other requests name it.
        waits: names of the requests that must be over before it.
        branches: names of the requests that it has spawned.
        blocks_parent: whether the session that has spawned its own goes on only when it is over.
        priority: that its client has named; None where the trace does not say.
        parent: the session that has spawned its own.
        scope: equal hash ids mean equal tokens within one scope.
        block: tokens per hash id; None where the trace does not say.
        whole: `input_length` counts the whole prompt, whatever was sent before; None where the trace does not say.
    """

    number: int
    where: str
    input_length: int
    output_length: int
    timestamp_s: float | None = None
    session_id: str | None = None
    delay_s: float | None = None
    hash_ids: Sequence[int] = ()
    name: str | None = None
    waits: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    blocks_parent: bool = False
    priority: int | None = None
    parent: str | None = None
    scope: str = ""
    block: int | None = None
    whole: bool | None = None


@dataclass
class TraceReading:
    """What was noticed while a trace was read.

    Args:
        unit: of times where the user says it; None for the dialect's own.
        ignored: fields without a meaning for a replay, in the order in which they were met.
        empty_answers: requests without an answer; they are replayed with one token.
        orphans: chats that continue one that is not in the trace.
    """

    unit: str | None = None
    dialect: str = ""
    ignored: dict[str, None] = field(default_factory=dict)
    empty_answers: int = 0
    orphans: int = 0

    def second(self, default: str) -> float:
        """Seconds of one unit of time."""
        return UNITS[self.unit or default]

    def ignore(self, entry: Entry, known: Sequence[str]) -> None:
        self.ignored.update(dict.fromkeys(name for name in entry.fields if name not in known))

    def answer(self, entry: Entry, name: str) -> int:
        """Tokens of an answer; one where the trace has recorded none."""
        tokens: int = entry.number_of(name, 1, 0, whole=True)
        self.empty_answers += not tokens
        return max(tokens, 1)


Reader = Callable[[Entry, TraceReading], Iterator[TraceLine]]


def reader_of(entry: Entry) -> tuple[str, Reader]:
    """The dialect of a trace and its reader, by the first entry; raises `WorkloadError` for one that is not read."""
    fields = entry.fields
    if entry.csv:
        if set(AZURE) <= set(fields):
            return "Azure", azure_lines
        raise entry.wrong(f"CSV with the columns {', '.join(fields)} is not read, only Azure's {', '.join(AZURE)}")
    if isinstance(fields.get("requests"), list):
        return "Weka", weka_lines
    if "dependencies" in fields or ("schema" in fields and "version" in fields):
        raise entry.wrong(
            "Dynamo's rows with a header and 'dependencies' are not read: write them with 'wait_for' and 'branches'"
        )
    if "chat_id" in fields:
        return "Bailian", bailian_lines
    return "Mooncake", mooncake_lines


def packed(ids: list[int]) -> Sequence[int]:
    """Hash ids in eight bytes each, where that is enough."""
    try:
        return array("q", ids)
    except OverflowError:
        return tuple(ids)


def hash_ids(entry: Entry) -> Sequence[int]:
    return packed(entry.list_of("hash_ids", int, "whole numbers"))


def prompt_tokens(entry: Entry, name: str) -> int:
    """The length of a prompt; raises `WorkloadError` where it is missing."""
    if entry.fields.get(name) is None:
        other = next((text for text in TEXTS if text in entry.fields), None)
        if other:
            raise entry.wrong(f"holds {other!r}; only traces with 'input_length' are replayed, texts are not")
        raise entry.wrong(f"no {name!r}: give the prompt's length in tokens")
    length: int = entry.number_of(name, None, 1, whole=True)
    return length


def mooncake_lines(entry: Entry, reading: TraceReading) -> Iterator[TraceLine]:
    """Mooncake's fields, and those that Dynamo adds."""
    names = {name: name if name in entry.fields else ALIASES[name] for name in ALIASES}
    if names["input_length"] not in entry.fields:
        names["input_length"] = "input_length"
    second = reading.second("ms")
    timestamp = entry.number_of(names["timestamp"], None, 0, whole=False)
    delay_s = None
    for name, unit in (("delay", second), ("delay_ms", 1e-3), ("tool_wait_ms", 1e-3)):
        if name == "delay_ms" and "delay" in entry.fields:
            continue
        given = entry.number_of(name, None, 0, whole=False)
        if given is not None:
            delay_s = (delay_s or 0.0) + given * unit
    session, request = (entry.fields.get(key) for key in ("session_id", "request_id"))
    waits = tuple(entry.list_of("wait_for", str, "names of requests"))
    if waits and delay_s is None:
        delay_s = 0.0
    known = [*names.values(), "delay", "hash_ids", "session_id", "request_id", "wait_for", "branches", "tool_wait_ms"]
    known += ["blocks_parent", "priority"]
    reading.ignore(entry, known if "delay" in entry.fields else [*known, "delay_ms"])
    yield TraceLine(
        number=entry.number,
        where=entry.where,
        input_length=prompt_tokens(entry, names["input_length"]),
        output_length=entry.number_of(names["output_length"], 1, 1, whole=True),
        timestamp_s=None if timestamp is None else timestamp * second,
        session_id=None if session is None else str(session),
        delay_s=delay_s,
        hash_ids=hash_ids(entry),
        name=None if request is None else str(request),
        waits=waits,
        branches=tuple(entry.list_of("branches", str, "names of requests")),
        blocks_parent=entry.truth_of("blocks_parent"),
        priority=entry.number_of("priority", None, -LARGEST_PRIORITY, whole=True, high=LARGEST_PRIORITY),
    )


def bailian_lines(entry: Entry, reading: TraceReading) -> Iterator[TraceLine]:
    known = ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "hash_ids", "turn")
    reading.ignore(entry, known)
    name, parent = (entry.fields.get(key) for key in ("chat_id", "parent_chat_id"))
    if name is None:
        raise entry.wrong("no 'chat_id', which the lines before have")
    timestamp = entry.number_of("timestamp", None, 0, whole=False)
    yield TraceLine(
        number=entry.number,
        where=entry.where,
        input_length=prompt_tokens(entry, "input_length"),
        output_length=reading.answer(entry, "output_length"),
        timestamp_s=None if timestamp is None else timestamp * reading.second("s"),
        hash_ids=hash_ids(entry),
        name=str(name),
        waits=() if parent in (None, -1, "-1") else (str(parent),),
        block=16,
        whole=True,
    )


def azure_lines(entry: Entry, reading: TraceReading) -> Iterator[TraceLine]:
    reading.ignore(entry, AZURE)
    time = str(entry.fields["TIMESTAMP"]).strip()
    try:
        moment = datetime.fromisoformat(time)
    except ValueError as error:
        raise entry.wrong(f"'TIMESTAMP' = {time!r} is not a date and time") from error
    numbers = []
    for name, low in (("ContextTokens", 1), ("GeneratedTokens", 0)):
        text = str(entry.fields[name]).strip()
        if not (text.isascii() and text.isdigit()) or len(text) > 12 or int(text) < low:
            raise entry.wrong(f"{name!r} = {text!r} is not allowed: it must be a whole number of at least {low}")
        numbers.append(int(text))
    reading.empty_answers += not numbers[1]
    yield TraceLine(
        number=entry.number,
        where=entry.where,
        input_length=numbers[0],
        output_length=max(numbers[1], 1),
        timestamp_s=(moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp(),
        whole=True,
    )


WEKA_TRACE = ("id", "block_size", "hash_id_scope", "requests")
WEKA_REQUEST = ("t", "type", "in", "out", "hash_ids", "api_time", "think_time")
WEKA_SUBAGENT = ("t", "type", "agent_id", "requests")


def weka_lines(entry: Entry, reading: TraceReading) -> Iterator[TraceLine]:
    """The requests of one session and of its sub-agents, in the order of the file."""
    reading.ignore(entry, WEKA_TRACE)
    block = entry.number_of("block_size", None, 1, whole=True)
    if block is None:
        raise entry.wrong("no 'block_size': give the tokens per hash id")
    name = str(entry.fields.get("id", f"trace-{entry.number}"))
    scope = "" if entry.fields.get("hash_id_scope") == "global" else name
    before: TraceLine | None = None
    """The request before of the parent; then its end, or that of the sub-agents since then, and their last requests."""
    end_s, joined = 0.0, list[str]()
    joined_s = 0.0
    for number, found in enumerate(entry.fields["requests"], start=1):
        where = f"{entry.where}, request {number}"
        if not isinstance(found, dict):
            raise entry.wrong(f"request {number} is no JSON object")
        one = Entry(entry.number, where, found)
        if found.get("type") == "subagent":
            agent = f"{name}:{found.get('agent_id', number)}"
            last = None
            for line, ended_s in subagent_lines(one, reading, agent, name, before, end_s, (scope, block)):
                last, joined_s = line, max(joined_s, ended_s)
                yield line
            if last is not None and last.name is not None and before is not None:
                joined.append(last.name)
            continue
        waits = (*joined, *(() if before is None or before.name is None else (before.name,)))
        # Where sub-agents are waited for, the time to think may hold theirs: what is left after them counts.
        ends_s = max(end_s, joined_s) if joined else end_s
        before, end_s = weka_request(
            one, reading, name, f"{name}/{number}", waits, ends_s, (scope, block), thinks=not joined
        )
        joined, joined_s = [], 0.0
        yield before


def subagent_lines(
    entry: Entry,
    reading: TraceReading,
    session: str,
    parent: str,
    spawner: TraceLine | None,
    spawned_s: float,
    blocks: tuple[str, int],
) -> Iterator[tuple[TraceLine, float]]:
    """The requests of a sub-agent and their ends; its first one waits for the parent's request before."""
    reading.ignore(entry, WEKA_SUBAGENT)
    begin_s = entry.number_of("t", 0.0, 0, whole=False)
    found = entry.list_of("requests", dict, "requests")
    waits = () if spawner is None or spawner.name is None else (spawner.name,)
    end_s = spawned_s
    for number, fields in enumerate(found, start=1):
        one = Entry(entry.number, f"{entry.where}, request {number}", fields)
        # Times count from the beginning of the session, or, as kv-cache-tester writes them, of the sub-agent.
        offset_s = begin_s if one.number_of("t", 0.0, 0, whole=False) + 1e-6 < begin_s else 0.0
        name = f"{session}/{number}"
        line, end_s = weka_request(
            one, reading, session, name, waits, end_s, blocks, offset_s, parent, thinks=number > 1
        )
        waits = (name,)
        yield line, end_s


def weka_request(
    entry: Entry,
    reading: TraceReading,
    session: str,
    name: str,
    waits: tuple[str, ...],
    before_s: float,
    blocks: tuple[str, int],
    offset_s: float = 0.0,
    parent: str | None = None,
    thinks: bool = True,
) -> tuple[TraceLine, float]:
    """A request, and when its answer was complete, in seconds of the trace.

    Args:
        before_s: when all that it waits for was complete.
        thinks: its `think_time` is the pause before it, where it is given.
    """
    reading.ignore(entry, WEKA_REQUEST)
    if entry.fields.get("type") not in ("n", "s", None):
        raise entry.wrong(f"'type' = {entry.fields['type']!r} is not known: it must be 'n', 's' or 'subagent'")
    begin_s = entry.number_of("t", 0.0, 0, whole=False) + offset_s
    think_s = entry.number_of("think_time", None, 0, whole=False) if thinks else None
    line = TraceLine(
        number=entry.number,
        where=entry.where,
        input_length=prompt_tokens(entry, "in"),
        output_length=reading.answer(entry, "out"),
        timestamp_s=begin_s,
        session_id=session,
        delay_s=(max(begin_s - before_s, 0.0) if think_s is None else think_s) if waits else None,
        hash_ids=hash_ids(entry),
        name=name,
        waits=waits,
        parent=parent,
        scope=blocks[0],
        block=blocks[1],
        whole=True,
    )
    return line, begin_s + entry.number_of("api_time", 0.0, 0, whole=False)
