"""Recorded traffic in the Mooncake JSONL form, as the Mooncake project publishes it and aiperf reads and writes it.

One request a line: `timestamp` (ms), `input_length` and `output_length` (tokens), `hash_ids` (one per block of the prompt;
equal ids mean equal tokens), and aiperf's `session_id` and `delay` (ms after the answer before). Prompts are made from the
ids: the same id gives the same tokens, in every arm.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_agentserve.bench.sessions import Session, Turn, WorkloadError, draw_tokens
from vllm_agentserve.options import read_json

BLOCK_TOKENS = 512
"""Tokens a hash id stands for, as in the published traces."""
SAMPLE = "sample"
MOST = 1e12
"""No number of a line is larger: tokens or ms."""


@dataclass(frozen=True)
class TraceLine:
    """One checked line of a trace; times in seconds, `hash_ids` empty where none are given."""

    number: int
    input_length: int
    output_length: int
    timestamp_s: float | None
    session_id: str | None
    delay_s: float
    hash_ids: tuple[int, ...]


@dataclass(frozen=True)
class TraceOptions:
    """How a trace is read.

    Args:
        pace: "closed": a session's next turn starts `delay` after the answer before, as agents do; lines without session
            are sessions of one turn. "open": every line starts at its `timestamp`, whatever the server does.
        inputs: what `input_length` counts in a session: "whole" prompts, or only what a turn "added" to the context;
            "auto" takes "whole" where the hash ids of a session's turns begin with the same block, else "added".
        scale: factor on all lengths; blocks shrink with them, so what is shared stays shared.
        speed: factor on the pace of timestamps and delays.
        limit: only the first so many lines.
    """

    pace: str = "closed"
    inputs: str = "auto"
    block_tokens: int = BLOCK_TOKENS
    scale: float = 1.0
    speed: float = 1.0
    limit: int | None = None


def read_trace(path: Path, options: TraceOptions, seed: int) -> list[Session]:
    """Reads a trace and makes sessions of it.

    Raises:
        WorkloadError: the file cannot be read or a line is wrong; the message names the line, the field and the remedy.
    """
    lines = list(read_lines(path, options.limit))
    if not lines:
        raise WorkloadError(f"trace {path} holds no requests: give a JSONL file with one request a line")
    if options.pace == "open":
        missing = next((line for line in lines if line.timestamp_s is None), None)
        if missing is not None:
            raise WorkloadError(
                f"trace {path}, line {missing.number}: no 'timestamp', which an open-loop replay goes by; replay it closed-loop"
            )
    begin = min((line.timestamp_s for line in lines if line.timestamp_s is not None), default=0.0)
    groups: dict[str, list[TraceLine]] = {}
    for line in lines:
        name = line.session_id if line.session_id is not None else f"line-{line.number}"
        groups.setdefault(name, []).append(line)
    maker = PromptMaker(options, seed)
    known = mostly_known(lines)
    sessions = []
    for name, group in groups.items():
        turns = maker.turns(group, whole=options.pace == "open" or is_whole(group, options.inputs))
        if options.pace == "open":
            for index, (line, turn) in enumerate(zip(group, turns, strict=True)):
                start = ((line.timestamp_s or 0.0) - begin) / options.speed
                single = f"{name}.{index + 1}" if len(group) > 1 else name
                sessions.append(Session(single, name, (turn,), start_s=start, cached=line.number in known, timed=True))
            continue
        start = ((group[0].timestamp_s or begin) - begin) / options.speed
        sessions.append(Session(name, name, tuple(turns), start_s=start, cached=group[0].number in known))
    return sessions


def trace_path(given: str) -> Path:
    """The file a user named; "sample" is the tiny one that ships with this package."""
    if given == SAMPLE:
        return Path(str(resources.files("vllm_agentserve.bench") / "sample_trace.jsonl"))
    return Path(given)


def is_whole(group: list[TraceLine], inputs: str) -> bool:
    """Whether `input_length` counts whole prompts in this session."""
    if inputs != "auto" or len(group) == 1:
        return inputs != "added" or len(group) == 1
    first = group[0].hash_ids[:1]
    return bool(first) and all(line.hash_ids[:1] == first for line in group)


def mostly_known(lines: list[TraceLine]) -> set[int]:
    """Numbers of the lines more than half of whose blocks stand at the same place in an earlier line."""
    seen: set[tuple[int, ...]] = set()
    known = set()
    for line in sorted(lines, key=lambda line: line.timestamp_s or 0.0):
        prefixes = [line.hash_ids[:end] for end in range(1, len(line.hash_ids) + 1)]
        if sum(prefix in seen for prefix in prefixes) * 2 > len(prefixes):
            known.add(line.number)
        seen.update(prefixes)
    return known


class PromptMaker:
    """Makes prompts from hash ids; tokens beyond the named blocks are the line's own."""

    def __init__(self, options: TraceOptions, seed: int) -> None:
        self.options = options
        self.seed = seed
        self.block = max(round(options.block_tokens * options.scale), 1)
        self._blocks: dict[int, tuple[int, ...]] = {}

    def turns(self, group: list[TraceLine], whole: bool) -> list[Turn]:
        made = []
        for index, line in enumerate(group):
            prompt = self.prompt(line)
            answer = max(round(line.output_length * self.options.scale), 1)
            pause = line.delay_s / self.options.speed if index else 0.0
            made.append(Turn((), answer, pause, context=prompt) if whole else Turn(prompt, answer, pause))
        return made

    def prompt(self, line: TraceLine) -> tuple[int, ...]:
        length = max(round(line.input_length * self.options.scale), 1)
        tokens: list[int] = []
        for number in line.hash_ids:
            tokens += self.tokens_of(number)
        own = random.Random(f"trace {self.seed} line {line.number}")
        if len(tokens) < length:
            tokens += draw_tokens(own, length - len(tokens))
        return tuple(tokens[:length])

    def tokens_of(self, number: int) -> tuple[int, ...]:
        if number not in self._blocks:
            self._blocks[number] = draw_tokens(random.Random(f"trace {self.seed} block {number}"), self.block)
        return self._blocks[number]


def read_lines(path: Path, limit: int | None = None) -> Iterator[TraceLine]:
    """Yields the checked lines of a trace file; empty lines are skipped."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"trace {path} cannot be read: {error}") from error
    found = 0
    for number, words in enumerate(text.splitlines(), start=1):
        if not words.strip():
            continue
        if limit is not None and found >= limit:
            return
        found += 1
        yield check_line(path, number, words)


def check_line(path: Path, number: int, words: str) -> TraceLine:
    """Raises `WorkloadError` that names the line, the field and what is allowed."""

    def wrong(what: str) -> WorkloadError:
        return WorkloadError(f"trace {path}, line {number}: {what}")

    try:
        fields = read_json(words)
    except ValueError as error:
        raise wrong(f"not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise wrong("not a JSON object")
    if "input_length" not in fields:
        other = next((name for name in ("text_input", "input_text", "messages") if name in fields), None)
        if other:
            raise wrong(f"holds {other!r}; only traces with 'input_length' are replayed, texts are not")
        raise wrong("no 'input_length': give the prompt's length in tokens")

    def a_number(name: str, default: float | None, low: float, whole: bool) -> Any:
        value = fields.get(name, default)
        if value is None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= MOST
            or (whole and value != int(value))
        ):
            kind = "whole number" if whole else "number"
            raise wrong(
                f"{name!r} = {value!r} is not allowed: it must be a {kind} of at least {low:g}, at most {MOST:g}"
            )
        return int(value) if whole else float(value)

    ids = fields.get("hash_ids") or []
    if not isinstance(ids, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise wrong(f"'hash_ids' = {ids!r} is not allowed: it must be a list of whole numbers")
    session = fields.get("session_id")
    timestamp = a_number("timestamp", None, 0, whole=False)
    return TraceLine(
        number=number,
        input_length=a_number("input_length", None, 1, whole=True),
        output_length=a_number("output_length", 1, 1, whole=True),
        timestamp_s=None if timestamp is None else timestamp / 1000,
        session_id=None if session is None else str(session),
        delay_s=a_number("delay", 0.0, 0, whole=False) / 1000,
        hash_ids=tuple(ids),
    )
