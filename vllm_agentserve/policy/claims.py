"""What the programs under way will want of the KV cache: their contexts, weighted by the probability that they come back."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from vllm_agentserve.policy.gaps import OwnGaps, Returns, Turn

TURNS_APART = 48
"""Calls of a program that are told apart by their number; later ones count as this one."""
AHEAD = (0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
"""Turns ahead at which the contexts of all programs are added up."""
LEAST_CALLS, ENOUGH = 5, 24
"""A program is assumed to have so many calls until that many programs were seen after a call of that turn: claims that are too
small cannot be taken back, since who has begun is never held, while claims that are too large end with their programs. Contexts
are assumed to grow to twice their size by that, no more."""
AT_MOST, LIKELY = 2.0, 1.6
"""Times their size to which contexts are assumed to grow while that is not known: who may begin is decided for the first,
whether a limit is worth having for the second."""
FEW = 4
"""Contexts are assumed to grow to more than twice their size only where so many programs were seen to go on so far."""
HELD_BACK = 0.95
"""Least probability of a return where programs usually return after their first call, until that many were seen after a call of
that turn."""
USUAL = 0.6
"""Programs usually return where more than this share of first calls is followed by another."""
CONTEXT_FADE = 0.9
"""What is left of a program's longest context with each shorter one."""
LAPSE = 0.03
"""A claim lapses when no more than this share of the gaps is longer."""
SLOWER, SLOWER_S = 0.1, 1.0
"""However short gaps were, so many are assumed to be longer than that: when tools get slower, all claims would lapse at once."""
UNKNOWN_S = 60.0
"""The same where no gap was ever seen: after so long."""


Begins = Literal["returning", "sub-agent", "one-shot", "bound", "unlimited", "alone", "idle", "fits"]
"""Why a call may begin: its program has begun; another one seems to wait for it; its like does not come back; it was held for the
longest time; there is no limit; nobody is under way; the engine has nothing to do; its program fits."""


@dataclass(slots=True, eq=False)
class LoadCall:
    """What load control knows of a call.

    Args:
        program: whose it is.
        came_s: when.
        prompt_tokens: tokens of its prompt.
        can_return: whether another call can go on from its answer.
        batch: whether every interactive call goes before it.
        ahead: whether it goes before others of its class that came before it: it has a deadline, or a priority.
        why: it may begin, once that is known.
        held: whether it was asked for and may not begin yet.
        passed: whether others may begin before it meanwhile: it wants most of the limit.
        begun: whether it has been scheduled.
        over: whether it has ended, in whatever way.
    """

    program: "Program"
    came_s: float
    prompt_tokens: int
    can_return: bool = True
    batch: bool = False
    ahead: bool = False
    why: Begins | None = None
    held: bool = False
    passed: bool = False
    begun: bool = False
    over: bool = False


@dataclass(slots=True)
class Program:
    """A program as load control sees it.

    Args:
        name: unique.
        named: whether the client gives it a name.
        tenant: see `Call.tenant`.
        begun: whether one of its calls has been scheduled.
        calls: those that wait or run.
        context: tokens of its longest context at the end of a call.
        kept: tokens of context that it is thought to need still: of its last call, or what is left of a longer one, which fades
            from call to call, since agents compact their contexts.
        turns: calls that ended.
        ended_s: when the last one did.
        tool: what it called then, if that was told.
        over: whether its client said that it ended.
    """

    name: str
    named: bool
    tenant: str = ""
    begun: bool = False
    calls: dict[LoadCall, None] = field(default_factory=dict)
    context: int = 0
    kept: float = 0.0
    turns: int = 0
    ended_s: float = 0.0
    tool: str | None = None
    over: bool = False
    own: OwnGaps = field(default_factory=OwnGaps)

    @property
    def wants(self) -> float:
        """Tokens of its longest context or prompt."""
        return max([self.kept, *(call.prompt_tokens for call in self.calls)])

    def answered(self, now_s: float, context_tokens: int, tool: str | None, child: bool) -> None:
        """A call of it ended; `child` if it was a sub-agent's, whose parent's context is still needed."""
        self.context = max(self.context, context_tokens)
        self.kept = max(self.kept if child else self.kept * CONTEXT_FADE, context_tokens)
        self.turns += 1
        self.ended_s, self.tool, self.begun = now_s, tool, True

    def turn(self, more: int = 0) -> Turn:
        """Its last call, the first before any ended; or the one so many later."""
        return self.named, min(max(self.turns, 1) + more, TURNS_APART)


def longer(program: Program, returns: Returns, away_s: float) -> float:
    """The share of its gaps that are longer."""
    found = program.own.longer(away_s, returns.longer(program.tool, away_s))
    return max(found, SLOWER) if away_s < SLOWER_S else found


def presence(program: Program, returns: Returns, now_s: float) -> float:
    """The probability that it comes back, 0 where its claim has lapsed."""
    if program.calls:
        return 1.0
    away = now_s - program.ended_s
    if not returns.gaps.samples:
        return 0.0
    left = longer(program, returns, away)
    if left <= LAPSE:
        return 0.0
    back = returns.probability(program.turn(), program.tool)
    if returns.begins(program.named) > USUAL and returns.seen(program.turn()) < ENOUGH:
        back = max(back, HELD_BACK)
    return back * left / (back * left + 1 - back)


def lapsed(program: Program, returns: Returns, now_s: float) -> bool:
    """Whether it has been away for longer than programs are."""
    away = now_s - program.ended_s
    if program.calls:
        return False
    return longer(program, returns, away) <= LAPSE if returns.gaps.samples else away > UNKNOWN_S


Stay = tuple[float, float]
"""The probability that a program is still there: as learned, and as assumed where too few were seen."""


def stays(returns: Returns, named: bool, number: int) -> list[Stay]:
    """The probability that a program in its call of that number is there so many turns later, for each of `AHEAD`."""
    found, learned, assumed, at = [], 1.0, 1.0, 0
    for turns in AHEAD:
        while at < turns:
            turn = named, min(number + at, TURNS_APART)
            share = returns.at_most(turn)
            learned *= share if returns.seen(turn) >= FEW else 0.0
            if number + at >= LEAST_CALLS or returns.seen(turn) >= ENOUGH:
                assumed *= share
            at += 1
        found.append((learned, assumed))
    return found


@dataclass(frozen=True)
class Claims:
    """What programs want of the KV cache.

    Args:
        programs: how many there are; one that comes back with probability 0.5 counts a half.
        ahead: tokens of their contexts so many turns later, for each of `AHEAD`.
        guessed: the same, where what is not known is guessed and not bounded.
    """

    programs: float = 0.0
    ahead: tuple[float, ...] = (0.0,) * len(AHEAD)
    guessed: tuple[float, ...] = (0.0,) * len(AHEAD)

    @property
    def now(self) -> float:
        """Tokens at the end of the next turn."""
        return self.ahead[0]

    @property
    def most(self) -> float:
        """The most tokens they will want together."""
        return max(self.ahead)

    @property
    def likely(self) -> float:
        """The most tokens they are likely to want together."""
        return max(self.guessed)

    def __add__(self, other: "Claims") -> "Claims":
        ahead = tuple(one + more for one, more in zip(self.ahead, other.ahead, strict=True))
        guessed = tuple(one + more for one, more in zip(self.guessed, other.guessed, strict=True))
        return Claims(self.programs + other.programs, ahead, guessed)


def claim(tokens: float, growth: float, stay: Iterable[Stay], share: float = 1.0) -> Claims:
    """What a program wants whose context has `tokens` and grows by `growth` a turn.

    Args:
        stay: the probability that it is still there, for each of `AHEAD`.
        share: the probability that it comes back at all; or how many such programs there are, `tokens` being their mean.
    """
    by_turn = [*zip(stay, AHEAD, strict=True)]

    def grown(times: float) -> tuple[float, ...]:
        return tuple(
            share * max(learned * (tokens + turns * growth), assumed * min(tokens + turns * growth, times * tokens))
            for (learned, assumed), turns in by_turn
        )

    return Claims(share, grown(AT_MOST), grown(LIKELY))
