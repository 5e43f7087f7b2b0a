"""Which lines of a trace follow each other in one session, and for which others they wait."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_agentserve.bench.sessions import WorkloadError
from vllm_agentserve.bench.trace_formats import TraceLine


@dataclass(frozen=True)
class Place:
    """A line as a turn of a session.

    Args:
        waits: turns of other sessions that must be over before it: name and number.
        parent: the session that has spawned this one, where it is its first turn.
    """

    line: TraceLine
    waits: tuple[tuple[str, int], ...] = ()
    parent: str | None = None


def chained(lines: Sequence[TraceLine], limit: int | None, chats: bool) -> tuple[dict[str, list[Place]], int]:
    """The lines by session, in order, and how many wait for lines that are not there.

    Without names of requests a session is what has one `session_id`. With them a line goes on with the session of a line that
    it waits for, if that one is the last there; otherwise it begins a session of its own.

    Args:
        chats: a chat whose earlier part is not in the trace begins where the trace does; otherwise that is an error.

    Raises:
        WorkloadError: a name is given twice, or not at all, or lines wait for each other.
    """
    if not any(line.waits or line.branches or line.blocks_parent for line in lines):
        groups: dict[str, list[Place]] = {}
        for line in lines:
            name = line.session_id if line.session_id is not None else f"line-{line.number}"
            groups.setdefault(name, []).append(Place(line))
        return groups, 0
    named = by_name(lines)
    spawner = {branch: line for line in lines for branch in line.branches}
    orphans = 0
    waits: dict[int, tuple[str, ...]] = {}
    for index, line in enumerate(lines):
        given = line.waits
        if not given and line.timestamp_s is None and line.name in spawner:
            given = (spawner[line.name].name or "",)
        missing = [name for name in given if name not in named]
        if missing and not chats:
            why = (
                f"which is not among the first {limit} lines: raise --limit"
                if limit
                else "no line has this 'request_id'"
            )
            raise WorkloadError(f"trace {line.where}: waits for {missing[0]!r}, {why}")
        orphans += bool(missing)
        waits[index] = tuple(dict.fromkeys(name for name in given if name in named))
    for index, names in held_back(lines, spawner):
        waits[index] = tuple(dict.fromkeys((*waits[index], *names)))
    return in_sessions(lines, named, waits, spawner), orphans


def held_back(lines: Sequence[TraceLine], spawner: Mapping[str, TraceLine]) -> list[tuple[int, tuple[str, ...]]]:
    """What `blocks_parent` adds: the next request of the session that has spawned a blocking one waits for that one.

    Returns:
        By place of the request that waits: the names of the request before in its session, and of the blocking one.

    Raises:
        WorkloadError: one of them has no name, or no line has spawned the session of a blocking request.
    """
    spawned = {line.session_id: spawner[line.name] for line in lines if line.name is not None and line.name in spawner}
    following: dict[int, int] = {}
    """By number of a line: the place of the next one of its session."""
    latest: dict[str, TraceLine] = {}
    for index, line in enumerate(lines):
        if line.session_id is not None:
            if line.session_id in latest:
                following[latest[line.session_id].number] = index
            latest[line.session_id] = line
    waiting: list[tuple[int, tuple[str, ...]]] = []
    for line in lines:
        if not line.blocks_parent:
            continue
        parent = spawner.get(line.name or "") or spawned.get(line.session_id)
        if parent is None or parent.session_id in (None, line.session_id):
            raise WorkloadError(
                f"trace {line.where}: 'blocks_parent' is given, and no line of another session names a request of its session "
                "in 'branches'"
            )
        if line.name is None or parent.name is None:
            raise WorkloadError(
                f"trace {line.where}: 'blocks_parent' is given; then it and the line that has spawned its session need a "
                "'request_id'"
            )
        if parent.number in following:
            waiting.append((following[parent.number], (parent.name, line.name)))
    return waiting


def by_name(lines: Sequence[TraceLine]) -> dict[str, int]:
    """The place of every named line; raises `WorkloadError` for a name that two have."""
    named: dict[str, int] = {}
    for index, line in enumerate(lines):
        if line.name is None:
            continue
        if line.name in named:
            other = lines[named[line.name]].where.rpartition(", ")[2]
            raise WorkloadError(f"trace {line.where}: its name {line.name!r} is also that of {other}")
        named[line.name] = index
    return named


def in_sessions(
    lines: Sequence[TraceLine],
    named: Mapping[str, int],
    waits: Mapping[int, Sequence[str]],
    spawner: Mapping[str, TraceLine],
) -> dict[str, list[Place]]:
    keys: dict[int, tuple[str, int]] = {}
    sessions: dict[str, list[Place]] = {}
    labels: dict[str, str | None] = {}
    for index in in_order(lines, named, waits):
        line = lines[index]
        before = [keys[named[name]] for name in waits[index]]
        ends = [key for key in before if key[1] == len(sessions[key[0]]) - 1]
        follows = next((key for key in ends if line.session_id is None or labels[key[0]] == line.session_id), None)
        if follows is None:
            label = line.session_id or (f"line-{line.number}" if line.name is None else f"request-{line.name}")
            name, number = label, 1
            while name in sessions:
                number += 1
                name = f"{label}#{number}"
            parent = line.parent
            spawned_by = spawner.get(line.name or "")
            if parent is None and spawned_by is not None:
                key = keys.get(named.get(spawned_by.name or "", -1))
                parent = None if key is None else key[0]
            sessions[name], labels[name] = [Place(line, tuple(before), parent)], line.session_id
        else:
            name = follows[0]
            sessions[name].append(Place(line, tuple(key for key in before if key != follows)))
        keys[index] = name, len(sessions[name]) - 1
    return sessions


def in_order(lines: Sequence[TraceLine], named: Mapping[str, int], waits: Mapping[int, Sequence[str]]) -> list[int]:
    """The lines so that each one comes after those it waits for; raises `WorkloadError` where there is no such order."""
    order: list[int] = []
    state: dict[int, bool] = {}
    """By line: whether it is in `order`; False while what it waits for is being put there."""
    for first in range(len(lines)):
        stack = [first]
        while stack:
            index = stack[-1]
            if state.get(index):
                stack.pop()
                continue
            open_ones = [named[name] for name in waits[index] if not state.get(named[name])]
            if not open_ones:
                state[index] = True
                order.append(index)
                stack.pop()
                continue
            state[index] = False
            circle = next((one for one in open_ones if one in state), None)
            if circle is not None:
                raise WorkloadError(
                    f"trace {lines[index].where}: waits for {lines[circle].name!r}, which waits for it: leave one wait out"
                )
            stack += open_ones
    return order
