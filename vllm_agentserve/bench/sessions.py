"""What agents will do, fixed before anything runs: sessions of turns over token ids, and where sessions start."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from vllm_agentserve.bench.tokens import TOKEN_IDS, RecordedTokens, draw_tokens, renamed
from vllm_agentserve.bench.walk import PlannedCall, Walk

PARENT_HINT = "agent_parent"
"""Key of vLLM's `vllm_xargs` under which a forked session names the session that spawned it; stock vLLM ignores it."""
LAST_HINT = "agent_last"
"""The same for saying that a session ends with a call."""
PRIORITY_HINT = "agent_priority"
"""The same for the priority of a call."""
CRITICAL_HINT = "agent_critical"
"""The same for saying that a call is critical."""
CRITICAL = "critical"
"""Kind of the sessions of agents whose calls say so."""
AGENTS = ("agent", CRITICAL)
"""Kinds of the sessions of agents."""
ONE_SHOT = "one-shot"
"""Kind of the sessions that are a single call, of nobody who is known."""
WARM_UP_PROGRAMS = 16
WARM_UP_TOOL_S = 5.0
"""A scheduler that learns how long tools take has seen them then, as on a server in use."""


class WorkloadError(ValueError):
    """A workload, its options or a trace cannot be used; the message names what, the value and the remedy."""


@dataclass(frozen=True)
class Turn:
    """One request of a session.

    Args:
        added: token ids appended to the context before the request: the prompt, or a tool's result.
        answer: tokens to generate.
        tool_s: seconds between the end of the previous answer and this request.
        spawns: names of sessions that fork from the context after this answer; the next turn waits for all of them.
        context: the whole prompt, when it does not grow from what came before (recorded traces); `added` is then empty.
        waits: turns of other sessions that must be over as well.
        at_s: seconds after the beginning of the workload before which it does not start.
        priority: sent as a hint; None for none.
    """

    added: Sequence[int]
    answer: int
    tool_s: float = 0.0
    spawns: tuple[str, ...] = ()
    context: Sequence[int] | None = None
    waits: tuple["TurnKey", ...] = ()
    at_s: float = 0.0
    priority: int | None = None


@dataclass(frozen=True)
class Session:
    """One agent's run over one growing context.

    Args:
        name: unique in the workload; also sent as `session_id`.
        turns: at least one.
        agent: whose it is; an agent has one session at a time, sub-agents are agents of their own.
        kind: "agent", `CRITICAL`, "chat", "batch" or `ONE_SHOT`. Batch sessions load the server; latencies of them are nobody's
            concern. Single calls are sent without a session id, and have a row of their own.
        start_s: seconds after the beginning of the workload, or after the end of `after`.
        after: the session that has to end before this one starts.
        forked: the context is a copy of another session's; that one starts it.
        cached: most of the first prompt has been sent by an earlier session.
        timed: requests are due by the clock, and what they take is counted from then on, not from when they were sent.
        program: name of the program it is part of, where the workload consists of programs.
        parent: the session that it says has spawned it, where its context is its own; that one need not wait for it.
        recorded: it is read from a trace.
        lead: it is one of the first of steady traffic, which are in no figure.
    """

    name: str
    agent: str
    turns: tuple[Turn, ...]
    kind: str = "agent"
    start_s: float = 0.0
    after: str | None = None
    forked: bool = False
    cached: bool = False
    program: str = ""
    timed: bool = False
    parent: str | None = None
    recorded: bool = False
    lead: bool = False

    def phase(self, turn: int) -> str:
        """ "cold" for a prompt without a cached context, otherwise "resume"."""
        return "resume" if turn or self.forked or self.cached else "cold"


def pinned_token(session: str, turn: int) -> int:
    """The one token an answer consists of where answers are pinned, so that contexts are the same in every arm."""
    return random.Random(f"answer {session} {turn}").randrange(*TOKEN_IDS)


class TurnKey(NamedTuple):
    """A turn: the name of its session, and its number there."""

    session: str
    number: int


def spawning(sessions: Iterable[Session]) -> dict[str, TurnKey]:
    """By the name of a forked session: the turn that spawns it."""
    return {
        name: TurnKey(session.name, number)
        for session in sessions
        for number, turn in enumerate(session.turns)
        for name in turn.spawns
    }


def session_walk(sessions: Iterable[Session]) -> Walk[TurnKey]:
    """The turns of all sessions as a walk: a session goes on from answer to answer, forks, and waits for what it spawned.

    A turn that spawned sessions is followed by the next one of its session when all of them are over, and those that they
    spawned. A forked session that no turn spawns is left out.

    Raises:
        WorkloadError: the sessions do not fit together, so that some would never begin.
    """
    sessions = list(sessions)
    check_sessions(sessions)
    by_name = {session.name: session for session in sessions}
    spawned_at = spawning(by_name.values())

    def ends(session: Session) -> tuple[TurnKey, ...]:
        """The turns that are over when the session is."""
        return following(session, len(session.turns) - 1)

    def following(session: Session, number: int) -> tuple[TurnKey, ...]:
        """What has to be over before anything follows a turn."""
        spawns = session.turns[number].spawns
        return tuple(end for name in spawns for end in ends(by_name[name])) or (TurnKey(session.name, number),)

    calls: dict[TurnKey, PlannedCall[TurnKey]] = {}
    for session in by_name.values():
        if session.forked and session.name not in spawned_at:
            continue
        for number, turn in enumerate(session.turns):
            delay_s, origin = turn.tool_s, None
            if number:
                after, origin = following(session, number - 1), TurnKey(session.name, number - 1)
            elif session.forked:
                after, origin = (spawned_at[session.name],), spawned_at[session.name]
            else:
                after, delay_s = (
                    () if session.after is None else ends(by_name[session.after]),
                    session.start_s + delay_s,
                )
            calls[TurnKey(session.name, number)] = PlannedCall((*after, *turn.waits), delay_s, origin, turn.at_s)
    check_order(calls, by_name)
    return Walk(calls)


def check_sessions(sessions: Sequence[Session]) -> None:
    """Raises `WorkloadError` where a session has no turns or no name of its own, or names one that it cannot wait for."""
    by_name: dict[str, Session] = {}
    for session in sessions:
        if not session.turns:
            raise wrong(session, "turns", (), "give it at least one turn")
        if session.name in by_name:
            raise wrong(session, "name", session.name, "another session has this name: give each one a name of its own")
        by_name[session.name] = session
    spawner: dict[str, str] = {}
    for session in sessions:
        for name in (name for turn in session.turns for name in turn.spawns):
            if name not in by_name:
                raise wrong(
                    session, "spawns", name, "no session has this name: add that session, or leave the name out"
                )
            if not by_name[name].forked:
                raise wrong(
                    session, "spawns", name, "that session starts by itself: set its field 'forked', or leave it out"
                )
            if name in spawner:
                raise wrong(session, "spawns", name, f"session {spawner[name]!r} spawns it already: name it once")
            spawner[name] = session.name
    for session in sessions:
        for key in (key for turn in session.turns for key in turn.waits):
            if key.session not in by_name or not 0 <= key.number < len(by_name[key.session].turns):
                raise wrong(session, "waits", tuple(key), "there is no such turn: name another one, or leave it out")
    started = {session.name for session in sessions if not session.forked}
    starting = list(started)
    for name in starting:
        starting += [other for turn in by_name[name].turns for other in turn.spawns]
    started.update(starting)
    for name, other in spawner.items():
        if name not in started:
            why = "this session never starts itself: let a turn of a session that starts spawn it, or leave both out"
            raise wrong(by_name[other], "spawns", name, why)
    for session in sessions:
        if session.after is None:
            continue
        if session.forked:
            raise wrong(
                session, "after", session.after, "the turn that spawns a forked session starts it: leave it out"
            )
        if session.after not in by_name:
            raise wrong(session, "after", session.after, "no session has this name: name another one, or leave it out")
        if session.after not in started:
            raise wrong(
                session, "after", session.after, "no turn spawns that forked session: name another one, or leave it out"
            )


def check_order(calls: Mapping[TurnKey, PlannedCall[TurnKey]], sessions: Mapping[str, Session]) -> None:
    """Raises `WorkloadError` where turns wait for each other in a circle, so that none of them would begin."""
    waiting = dict(calls)
    for key, _ in Walk(calls).in_order():
        del waiting[key]
    if not waiting:
        return
    chain = [next(iter(waiting))]
    while (before := next(key for key in waiting[chain[-1]].after if key in waiting)) not in chain:
        chain.append(before)
    circle = {key.session for key in chain[chain.index(before) :]}
    names = [name for name in sessions if name in circle]
    session = next((sessions[name] for name in names if sessions[name].after is not None), sessions[names[0]])
    why = f"the sessions {', '.join(map(repr, names))} wait for each other" if len(names) > 1 else "it waits for itself"
    field, value = ("after", session.after) if session.after is not None else ("waits", circle_waits(session))
    raise wrong(session, field, value, f"{why}: name another session, or leave it out")


def circle_waits(session: Session) -> tuple[TurnKey, ...]:
    """What the turns of a session wait for in other sessions."""
    return tuple(key for turn in session.turns for key in turn.waits)


def wrong(session: Session, field: str, value: object, remedy: str) -> WorkloadError:
    return WorkloadError(f"session {session.name!r}: {field} = {value!r} is not allowed, {remedy}")


def contexts(sessions: Iterable[Session]) -> dict[TurnKey, int]:
    """By turn: tokens of its prompt and its answer; forks begin with the context they fork from."""
    sessions = list(sessions)
    by_name = {session.name: session for session in sessions}
    tokens: dict[TurnKey, int] = {}
    for key, call in session_walk(sessions).in_order():
        turn = by_name[key.session].turns[key.number]
        before = 0 if call.origin is None else tokens[call.origin]
        prompt = before + len(turn.added) if turn.context is None else len(turn.context)
        tokens[key] = prompt + turn.answer
    return tokens


def longest_context(sessions: Iterable[Session]) -> int:
    """Tokens of the longest prompt plus its answer, over all sessions; forks begin with their parent's context."""
    return max(longest_contexts(sessions).values(), default=0)


def live_context(sessions: Iterable[Session]) -> int:
    """Tokens that a KV cache needs to keep every agent's context at its longest: the sum over agents. Single calls have none."""
    sessions = list(sessions)
    longest, of_agents = longest_contexts(sessions), dict[str, int]()
    for session in (one for one in sessions if one.kind != ONE_SHOT):
        of_agents[session.agent] = max(of_agents.get(session.agent, 0), longest[session.name])
    return sum(of_agents.values())


def longest_contexts(sessions: Iterable[Session]) -> dict[str, int]:
    """By name of the session: tokens of its longest prompt plus its answer."""
    sessions = list(sessions)
    longest = {session.name: 0 for session in sessions}
    for key, tokens in contexts(sessions).items():
        longest[key.session] = max(longest[key.session], tokens)
    return longest


def salted(sessions: Sequence[Session], salt: str) -> list[Session]:
    """The same sessions in other token ids, so that a prefix cache which holds them finds nothing; "" changes nothing.

    Every id becomes another one, the same everywhere: what sessions have in common they still have in common.
    """
    if not salt:
        return list(sessions)
    ids = range(*TOKEN_IDS)
    other = tuple(random.Random(f"salt {salt}").sample(ids, len(ids)))

    def changed(turn: Turn) -> Turn:
        context = None if turn.context is None else renamed(turn.context, other)
        return replace(turn, added=renamed(turn.added, other), context=context)

    return [replace(session, turns=tuple(map(changed, session.turns))) for session in sessions]


def count_requests(sessions: Iterable[Session]) -> int:
    return sum(len(session.turns) for session in sessions)


def warm_up_of(sessions: Sequence[Session], seed: str, turns: int = 2) -> list[Session]:
    """A short stand-in for the same work with other token ids: every agent's first session, `turns` turns, tools of up to
    `WARM_UP_TOOL_S`; of programs and of recorded sessions only the first `WARM_UP_PROGRAMS`."""
    rng = random.Random(f"warm-up {seed}")
    seen: set[str] = set()
    short: list[Session] = []
    for session in sessions:
        if session.agent in seen or session.forked or session.after is not None:
            continue
        if (session.program or session.recorded) and len(short) == WARM_UP_PROGRAMS:
            break
        seen.add(session.agent)
        cut = tuple(
            Turn(draw_tokens(rng, _fresh(turn)), min(turn.answer, 16), min(turn.tool_s, WARM_UP_TOOL_S))
            for turn in session.turns[:turns]
        )
        short.append(Session(f"warm-up-{session.name}", session.agent, cut, session.kind, 0.2 * len(short)))
    return short


OTHER = (*range(sum(TOKEN_IDS) // 2, TOKEN_IDS[1]), *range(TOKEN_IDS[0], sum(TOKEN_IDS) // 2))
"""Another token id for each one, so that a prompt of the same shape is not found in the prefix cache."""


def alone_of(sessions: Sequence[Session], seed: str) -> list[Session]:
    """The same sessions one after the other, with other token ids and without tool times: what each takes when isolated. Batch
    sessions and single calls are left out: they have no thresholds.

    Forked sessions become sessions of their own that start with as many tokens as they inherit; their first turn is then
    cold, so it is left out of the thresholds.
    """
    rng = random.Random(f"alone {seed}")
    tokens = contexts(sessions)
    inherited = {name: tokens[key] for name, key in spawning(sessions).items()}
    alone: list[Session] = []
    for session in sessions:
        if session.kind in ("batch", ONE_SHOT):
            continue
        turns = []
        for index, turn in enumerate(session.turns):
            more = inherited.get(session.name, 0) if index == 0 else 0
            if turn.context is not None:
                # Block contents decide what is cached: the same pattern of repetition under another alphabet.
                turns.append(Turn((), turn.answer, context=renamed(turn.context, OTHER)))
            elif session.recorded:
                seed_of_turn = f"alone {seed} {session.name} {index}"
                turns.append(Turn(RecordedTokens("", (), 1, seed_of_turn, len(turn.added)), turn.answer))
            else:
                turns.append(Turn(draw_tokens(rng, more + len(turn.added)), turn.answer))
        after = alone[-1].name if alone else None
        alone.append(Session(f"alone-{session.name}", session.agent, tuple(turns), session.kind, 0.0, after))
    return alone


def _fresh(turn: Turn) -> int:
    return len(turn.added) if turn.context is None else len(turn.context)
