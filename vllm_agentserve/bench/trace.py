"""Recorded traffic as sessions; `trace_formats` says which dialects are read.

Prompts are made from hash ids when they are sent: the same id gives the same tokens, in every arm.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from vllm_agentserve.bench.sessions import Session, Turn, TurnKey, WorkloadError
from vllm_agentserve.bench.tokens import RecordedTokens
from vllm_agentserve.bench.trace_checks import check_blocks, check_names, check_times, check_unit
from vllm_agentserve.bench.trace_files import read_entries
from vllm_agentserve.bench.trace_formats import Reader, TraceLine, TraceReading, reader_of
from vllm_agentserve.bench.trace_links import Place, chained

BLOCK_TOKENS = 512
"""Tokens a hash id stands for where the trace does not say, as in the traces that the Mooncake project publishes."""
SAMPLE = "sample"


@dataclass(frozen=True)
class TraceOptions:
    """How a trace is read.

    Args:
        pace: "closed": a session's next turn starts `delay` after the answer before, as agents do; lines without session
            are sessions of one turn. "open": every line starts at its `timestamp`, whatever the server does.
        inputs: what `input_length` counts in a session: "whole" prompts, or only what a turn "added" to the context;
            "auto" takes what the dialect says, or "whole" where the hash ids of a session's turns begin with the same block,
            else "added".
        block_tokens: tokens per hash id; None for what the trace says, or its dialect.
        scale: factor on all lengths; blocks shrink with them, so what is shared stays shared.
        speed: factor on the pace of timestamps and delays.
        limit: only the first so many lines.
        unit: of times, "ms" or "s"; None for the dialect's own.
    """

    pace: str = "closed"
    inputs: str = "auto"
    block_tokens: int | None = None
    scale: float = 1.0
    speed: float = 1.0
    limit: int | None = None
    unit: str | None = None


def read_trace(path: Path, options: TraceOptions, seed: int) -> list[Session]:
    """Reads a trace and makes sessions of it; raises as `Trace` does."""
    return Trace(path, options).sessions(seed)


def trace_path(given: str) -> Path:
    """The file a user named; "sample" is the tiny one that ships with this package."""
    if given == SAMPLE:
        return Path(str(resources.files("vllm_agentserve.bench") / "sample_trace.jsonl"))
    return Path(given)


class Trace:
    """The checked lines of a trace; prompts are not made yet.

    Raises:
        WorkloadError: the file cannot be read, or a line is wrong or contradicts itself; the message names the line, the
            field and the remedy.
    """

    def __init__(self, path: Path, options: TraceOptions) -> None:
        self.path = path
        self.options = options
        self._reading = TraceReading(options.unit)
        self.lines = read_lines(path, self._reading, options.limit)
        if not self.lines:
            raise WorkloadError(f"trace {path} holds no requests: give a JSONL file with one request a line")
        check_names(self.lines)
        check_unit(path, self.lines, options.unit, self._reading.dialect)
        check_blocks(self.lines, options.block_tokens, BLOCK_TOKENS)
        if options.pace == "open":
            missing = next((line for line in self.lines if line.timestamp_s is None), None)
            if missing is not None:
                raise WorkloadError(
                    f"trace {missing.where}: no 'timestamp', which an open-loop replay goes by; replay it closed-loop"
                )
        else:
            check_times(self.lines)
        self._known = mostly_known(self.lines)
        self._chains, self._reading.orphans = chained(self.lines, options.limit, self._reading.dialect == "Bailian")

    def sessions(self, seed: int) -> list[Session]:
        """The sessions, with the token ids of a seed."""
        begin_s = min((line.timestamp_s for line in self.lines if line.timestamp_s is not None), default=0.0)
        sessions: list[Session] = []
        for name, places in self._chains.items():
            group = [place.line for place in places]
            whole = self.options.pace == "open" or is_whole(group, self.options.inputs)
            prompts = [self.prompt(line, seed, name if whole and len(group) > 1 else "") for line in group]
            if self.options.pace == "open":
                sessions += self.timed(name, group, prompts, begin_s)
            else:
                sessions.append(self.session(name, places, prompts, whole, begin_s))
        return sessions

    def session(
        self, name: str, places: Sequence[Place], prompts: Sequence[RecordedTokens], whole: bool, begin_s: float
    ) -> Session:
        """A session whose turns follow from answers."""
        turns = []
        speed = self.options.speed
        for index, (place, prompt) in enumerate(zip(places, prompts, strict=True)):
            line = place.line
            follows = bool(index or place.waits)
            pause_s = (line.delay_s or 0.0) / speed if follows else 0.0
            # Where only the time of a later turn is known, it starts then, or when the answer before is complete.
            timed = follows and line.delay_s is None and line.timestamp_s is not None
            at_s = ((line.timestamp_s or 0.0) - begin_s) / speed if timed else 0.0
            added, context = ((), prompt) if whole else (prompt, None)
            waits = tuple(TurnKey(*key) for key in place.waits)
            answer, priority = self.answer(line), line.priority
            turns.append(Turn(added, answer, pause_s, context=context, waits=waits, at_s=at_s, priority=priority))
        first = places[0]
        start_s = 0.0 if first.waits else ((first.line.timestamp_s or begin_s) - begin_s) / speed
        return Session(
            name,
            name,
            tuple(turns),
            start_s=start_s,
            cached=first.line.number in self._known,
            parent=first.parent,
            recorded=True,
        )

    def timed(
        self, name: str, group: Sequence[TraceLine], prompts: Sequence[RecordedTokens], begin_s: float
    ) -> list[Session]:
        """One session for every line, by the clock."""
        sessions = []
        for index, (line, prompt) in enumerate(zip(group, prompts, strict=True)):
            start_s = ((line.timestamp_s or 0.0) - begin_s) / self.options.speed
            single = f"{name}.{index + 1}" if len(group) > 1 else name
            while single != name and single in self._chains:
                single += "."  # Another session of the trace has that name.
            turn = Turn((), self.answer(line), context=prompt, priority=line.priority)
            known = line.number in self._known
            sessions.append(Session(single, name, (turn,), start_s=start_s, cached=known, timed=True, recorded=True))
        return sessions

    def answer(self, line: TraceLine) -> int:
        return max(round(line.output_length * self.options.scale), 1)

    def prompt(self, line: TraceLine, seed: int, session: str) -> RecordedTokens:
        """The prompt of a line; tokens beyond the named blocks are its own.

        Args:
            session: whose whole prompts these are, or ""; where no blocks are named, each one begins with the one before.
        """
        block = self.block_of(line)
        own = f"session {session}" if session and not line.hash_ids else f"line {line.number}"
        scope = f"trace {seed} {line.scope}" if line.scope else f"trace {seed}"
        return RecordedTokens(
            scope,
            line.hash_ids,
            max(round(block * self.options.scale), 1),
            f"trace {seed} {own}",
            max(round(line.input_length * self.options.scale), 1),
        )

    def block_of(self, line: TraceLine) -> int:
        return self.options.block_tokens or line.block or BLOCK_TOKENS

    def summary(self) -> list[str]:
        """What was read and what was not, a sentence each."""
        tokens = sum(line.input_length for line in self.lines)
        times = [line.timestamp_s for line in self.lines if line.timestamp_s is not None]
        blocks = sorted({self.block_of(line) for line in self.lines if line.hash_ids})
        said = [
            f"Trace {self.path.name}, {self._reading.dialect}: {len(self.lines):,} requests in {len(self._chains):,} sessions, "
            f"{tokens:,} tokens of prompts"
            + (f", {' and '.join(map(str, blocks))} tokens per hash id" if blocks else "")
            + (f", {max(times) - min(times):,.1f} s from the first to the last." if times else ", without times.")
        ]
        reading = self._reading
        if reading.ignored:
            said.append(f"Fields of the trace that a replay does not use: {', '.join(reading.ignored)}.")
        if reading.empty_answers:
            said.append(f"Requests without an answer, replayed with an answer of one token: {reading.empty_answers:,}.")
        if reading.orphans:
            said.append(
                f"Chats that continue one that is not in the trace, and start by themselves: {reading.orphans:,}."
            )
        return said


def read_lines(path: Path, reading: TraceReading, limit: int | None = None) -> list[TraceLine]:
    """The checked lines of a trace; what is noticed goes into `reading`."""
    lines: list[TraceLine] = []
    reader: Reader | None = None
    for entry in read_entries(path):
        if limit is not None and len(lines) >= limit:
            break
        if reader is None:
            reading.dialect, reader = reader_of(entry)
        elif (other := reader_of(entry)[0]) != reading.dialect:
            raise entry.wrong(
                f"is {other}'s form, and the lines before are {reading.dialect}'s: give one form in a trace"
            )
        lines += reader(entry, reading)
    # Places in the whole trace: numbers of lines are given once for every file of a folder.
    return [replace(line, number=number) for number, line in enumerate(lines[:limit], start=1)]


def is_whole(group: Sequence[TraceLine], inputs: str) -> bool:
    """Whether `input_length` counts whole prompts in this session."""
    if len(group) == 1:
        return True
    if inputs != "auto":
        return inputs == "whole"
    if group[0].whole is not None:
        return group[0].whole
    first = group[0].hash_ids[:1]
    return bool(first) and all(line.hash_ids[:1] == first for line in group)


def mostly_known(lines: Iterable[TraceLine]) -> set[int]:
    """Numbers of the lines more than half of whose blocks stand at the same place in an earlier line."""
    seen: set[int] = set()
    known = set()
    for line in sorted(lines, key=lambda line: line.timestamp_s or 0.0):
        # Every prefix is known by the hash of the one before and its own last block.
        prefix = hash(line.scope)
        found = 0
        prefixes = []
        for number in line.hash_ids:
            prefix = hash((prefix, number))
            found += prefix in seen
            prefixes.append(prefix)
        if found * 2 > len(prefixes):
            known.add(line.number)
        seen.update(prefixes)
    return known
