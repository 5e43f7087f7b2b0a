"""Whether the lines of a trace contradict themselves: block ids against lengths, times against their unit and each other."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from vllm_agentserve.bench.sessions import WorkloadError
from vllm_agentserve.bench.trace_formats import TraceLine

BUSIEST = 100.0
"""Requests a second above which times are taken for seconds that are read as milliseconds."""
FEWEST = 20
"""Lines below which nothing is said about the unit."""


def check_blocks(lines: Sequence[TraceLine], given: int | None, default: int) -> None:
    """Raises `WorkloadError` for a line whose hash ids are too many or too few for its length.

    A last block that is not full may have an id of its own or none.

    Args:
        given: tokens per hash id as the user says it.
        default: the same where neither the user nor the trace says it.
    """
    for line in lines:
        count, length = len(line.hash_ids), line.input_length
        block = given or line.block or default
        if not count or length // block <= count <= -(-length // block):
            continue
        fits = fitting_block(lines)
        remedy = f"blocks of {fits} fit: give --block-tokens {fits}" if fits else "no size of blocks fits all lines"
        raise WorkloadError(
            f"trace {line.where}: {count} 'hash_ids' of {block} tokens contradict 'input_length' = {length}, {remedy}"
        )


def fitting_block(lines: Iterable[TraceLine]) -> int | None:
    """Tokens per hash id with which the ids of all lines fit their lengths; the roundest number where several do."""
    low, high = 1, 1 << 20
    for line in lines:
        count, length = len(line.hash_ids), line.input_length
        if not count:
            continue
        low = max(low, length // (count + 1) + 1)
        # One id for a short prompt fits every larger block.
        most = math.ceil(length / (count - 1)) - 1 if count > 1 else max(length, 1 << 16)
        high = min(high, most)
    for power in range(20, -1, -1):
        step = 1 << power
        if (rounded := -(-low // step) * step) <= high:
            return rounded
    return None


def check_unit(path: Path, lines: Sequence[TraceLine], given: str | None, dialect: str) -> None:
    """Raises `WorkloadError` where times that are read as milliseconds can only be seconds, and nobody has said so."""
    if given is not None or dialect != "Mooncake":
        return
    times = [line.timestamp_s for line in lines if line.timestamp_s is not None]
    if len(times) < FEWEST or not (span_s := max(times) - min(times)):
        return
    if len(times) / span_s > BUSIEST:
        raise WorkloadError(
            f"trace {path}: as milliseconds, its timestamps are {len(times) / span_s:,.0f} requests a second: say what they are "
            f"with --time-unit s, or --time-unit ms"
        )


def check_names(lines: Iterable[TraceLine]) -> None:
    """Raises `WorkloadError` for a name that cannot be sent or written: half of a surrogate pair is in it."""
    for line in lines:
        for name in (line.session_id, line.name, line.parent):
            if name is not None and not name.isascii():
                try:
                    name.encode()
                except UnicodeEncodeError as error:
                    raise WorkloadError(f"trace {line.where}: the name {name!r} is no text ({error.reason})") from error


def check_times(lines: Iterable[TraceLine]) -> None:
    """Raises `WorkloadError` for a line that is earlier than the one before in its session."""
    latest: dict[str, TraceLine] = {}
    for line in lines:
        if line.session_id is None or line.timestamp_s is None:
            continue
        before = latest.setdefault(line.session_id, line)
        if line.timestamp_s < (before.timestamp_s or 0.0):
            raise WorkloadError(
                f"trace {line.where}: a timestamp before that of {before.where.rpartition(', ')[2]}, both of session "
                f"{line.session_id!r}: order the lines of a session by time"
            )
        latest[line.session_id] = line
