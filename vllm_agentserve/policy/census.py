"""Where every call of a program is: waiting, in its prompt, or decoding; and what its program holds and has decoded."""

import enum
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice


class Stage(enum.IntEnum):
    """What a call does."""

    WAITING = 0
    COLD = 1
    """It computes its prompt, as a cold prefill."""
    RESUME = 2
    """It computes its prompt, as a resume prefill."""
    DECODING = 3
    DONE = 4


@dataclass(slots=True)
class Tally:
    """What is counted of a program.

    `decode_tokens`, `decode_ms` and `kv_tokens` are kept less the clock's reading at which each decoding call began to decode,
    so that time passes for all calls at once; `Census.decoded` and `Census.kv_tokens` give the figures.
    """

    turns: int = 0
    """Calls so far."""
    in_stage: list[int] = field(default_factory=lambda: [0] * len(Stage))
    """Calls under way by stage."""
    waiting: "dict[str, Presence]" = field(default_factory=dict)
    """The waiting ones, the one that waits longest first."""
    prompt_tokens: int = 0
    """Of the calls admitted so far."""
    cached_tokens: int = 0
    """How many of these the KV cache held at admission."""
    decode_tokens: int = 0
    decode_ms: float = 0.0
    kv_tokens: int = 0

    @property
    def calls(self) -> int:
        """Calls under way."""
        return sum(self.in_stage[: Stage.DONE])


@dataclass(slots=True)
class Presence:
    """What is counted of a call; `kv_tokens` are kept as those of its program."""

    call_id: str
    tally: Tally
    since: float
    """When it last began to wait, in s."""
    level: int
    stage: Stage = Stage.WAITING
    admitted: bool = False
    kv_tokens: int = 0
    waited_s: float = 0.0
    """How long its earlier waits took together: a call that loses its place waits more than once."""


class Census:
    """Follows calls through their stages, O(1) per event and per step.

    Decoding calls share a clock: every step gives each of them one token and took as long for all of them. With pipeline
    parallelism a step decodes a part of the calls only, and each of them counts that part of a token.

    Args:
        levels: at which calls can wait.
    """

    def __init__(self, levels: int) -> None:
        self.waiting = [0] * levels
        """Waiting calls by the level they were last seen at."""
        self._active: OrderedDict[str, Tally] = OrderedDict()
        self._steps = 0
        self._part = 0.0
        self._step_ms = 0.0

    def arrives(self, call_id: str, key: str, tally: Tally, level: int, now: float) -> Presence:
        """A call of the program `key` came at `now` (s) and waits at this level."""
        presence = Presence(call_id, tally, now, level)
        tally.turns += 1
        self._active[key] = tally
        self._active.move_to_end(key)
        self._enter(presence, Stage.WAITING)
        return presence

    def prefills(
        self, presence: Presence, stage: Stage, prompt_tokens: int, before: int, tokens: int, now: float
    ) -> None:
        """At `now` (s) so many tokens of the call's prompt are scheduled, over `before` that are computed or were cached."""
        tally = presence.tally
        if presence.stage is not stage:
            self._leave(presence, now)
            self._enter(presence, stage)
        if not presence.admitted:
            presence.admitted = True
            tally.prompt_tokens += prompt_tokens
            tally.cached_tokens += min(before, prompt_tokens)
        tally.kv_tokens += before + tokens - presence.kv_tokens
        presence.kv_tokens = before + tokens

    def decodes(self, presence: Presence, now: float) -> None:
        """The call's prompt is through."""
        self._leave(presence, now)
        self._enter(presence, Stage.DECODING)
        self._read_clock(presence, -1)

    def pauses(self, presence: Presence, now: float) -> None:
        """The call lost its place and its KV, and waits since `now` (s)."""
        self._leave(presence, now)
        self._let_go(presence)
        presence.since = now
        self._enter(presence, Stage.WAITING)

    def ends(self, presence: Presence, key: str, now: float) -> None:
        """The call is through."""
        self._leave(presence, now)
        self._let_go(presence)
        presence.stage = Stage.DONE
        if not presence.tally.calls:
            self._active.pop(key, None)

    def moves(self, presence: Presence, level: int) -> None:
        """The call waits at this level, if it waits."""
        if presence.level != level:
            if presence.stage is Stage.WAITING:
                self.waiting[presence.level] -= 1
                self.waiting[level] += 1
            presence.level = level

    def waited_s(self, presence: Presence, now: float) -> float:
        """How long the call has waited at time `now` (s), all its waits together."""
        return presence.waited_s + (now - presence.since if presence.stage is Stage.WAITING else 0.0)

    def advance(self, step_ms: float, part: float = 1.0) -> None:
        """A step took so long, and decoded this part of the decoding calls."""
        self._part += part
        if self._part > 1 - 1e-9:
            self._part -= 1
            self._steps += 1
        self._step_ms += step_ms

    def decoded(self, tally: Tally) -> tuple[int, float]:
        """Tokens the program's calls have decoded, one per call and step, and the ms that took, summed over calls."""
        decoding = tally.in_stage[Stage.DECODING]
        return tally.decode_tokens + decoding * self._steps, tally.decode_ms + decoding * self._step_ms

    def kv_tokens(self, tally: Tally) -> int:
        """Tokens whose KV the program's calls hold; what they share counts for each."""
        return tally.kv_tokens + tally.in_stage[Stage.DECODING] * self._steps

    def active(self, limit: int) -> list[str]:
        """The programs with calls under way, the one whose latest call came last first; O(limit)."""
        return list(islice(reversed(self._active), limit))

    def _enter(self, presence: Presence, stage: Stage) -> None:
        presence.stage = stage
        presence.tally.in_stage[stage] += 1
        if stage is Stage.WAITING:
            presence.tally.waiting[presence.call_id] = presence
            self.waiting[presence.level] += 1

    def _leave(self, presence: Presence, now: float) -> None:
        presence.tally.in_stage[presence.stage] -= 1
        if presence.stage is Stage.WAITING:
            presence.waited_s += now - presence.since
            del presence.tally.waiting[presence.call_id]
            self.waiting[presence.level] -= 1
        elif presence.stage is Stage.DECODING:
            self._read_clock(presence, 1)

    def _read_clock(self, presence: Presence, sign: int) -> None:
        tally, steps = presence.tally, sign * self._steps
        tally.decode_tokens += steps
        tally.decode_ms += sign * self._step_ms
        tally.kv_tokens += steps
        presence.kv_tokens += steps

    def _let_go(self, presence: Presence) -> None:
        presence.tally.kv_tokens -= presence.kv_tokens
        presence.kv_tokens = 0
