"""Which of several engines a call goes to.

A conversation is fastest where the KV of its earlier turns is. So the default, `conserve`, places conversations and not turns
(ConServe, arXiv 2606.01839): the first turn goes to the engine with the most room for it, by its length and by the tokens of
the conversations that live on each engine, and all later turns follow. `autellix` sends short calls to the engine with the
fewest calls, and long ones to their program's own (Autellix, arXiv 2502.13965). The others are there to compare with.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from vllm_agentserve.policy.fleet import EngineLoad, Fleet, rendezvous
from vllm_agentserve.policy.gateway import LONGEST_NAME
from vllm_agentserve.policy.pins import Pins

__all__ = ["REASONS", "SHORT_TOKENS", "Decision", "EngineLoad", "NoEngineError", "Placement", "Policy"]

Policy = Literal["conserve", "autellix", "round-robin", "least-loaded", "hash", "sticky"]
"""- `conserve`: conversations to the engine with the most room when they begin, and pinned;
- `autellix`: calls up to `SHORT_TOKENS` to the engine with the fewest calls, others pinned to their program's;
- `round-robin`, `least-loaded`: every call by itself, to the engines in turn, to the one with the fewest calls;
- `hash`: every call by its session, over the engines that live (rendezvous hashing);
- `sticky`: conversations to the engine that has the fewest calls when they begin, and pinned."""
Reason = Literal["pinned", "first", "parent", "crowded", "moved", "short", "per-call"]
"""- `pinned`: where its conversation lives;
- `first`: a conversation's first call, or one without a session;
- `parent`: a sub-agent's first call, to its parent's engine; `crowded`: to another one, as that is over its bound;
- `moved`: the conversation's engine does not live any more;
- `short`: of `autellix`;
- `per-call`: of the policies that do not pin."""
REASONS: tuple[Reason, ...] = get_args(Reason)
SHORT_TOKENS = 2048
"""Of `autellix`: up to here it costs less to compute a context again than to wait for one engine."""


class NoEngineError(LookupError):
    """No engine lives."""


@dataclass(frozen=True)
class Decision:
    """Where a call goes, and why.

    Args:
        engine: where it goes.
        reason: one of `REASONS`.
        moved_from: the engine that its conversation was pinned to, if that is another one.
    """

    engine: str
    reason: Reason
    moved_from: str | None = None


class Placement:
    """Places calls on engines. It has no clock: every method is given the time in seconds, which must not go back.

    Args:
        policy: see `Policy`.
        bound: from 1. Under `conserve` a conversation does not begin on an engine that would have more than so many times its
            fair share of KV tokens while another one has room. A sub-agent does not begin on its parent's engine if that would
            have more than so many times its fair share of KV tokens or calls.
        pin_seconds: a conversation's pin expires when it has done nothing for so long.
        max_pins: conversations that are remembered, from 1.

    Raises:
        ValueError: one of them is not allowed.
    """

    def __init__(
        self, policy: str = "conserve", *, bound: float = 1.25, pin_seconds: float = 3600.0, max_pins: int = 65536
    ) -> None:
        if policy not in get_args(Policy):
            raise ValueError(f"policy = {policy!r} is not allowed: it must be one of {', '.join(get_args(Policy))}")
        if not 1 <= bound < float("inf"):
            raise ValueError(f"bound = {bound!r} is not allowed: it must be a number from 1")
        if not 0 < pin_seconds < float("inf"):
            raise ValueError(f"pin_seconds = {pin_seconds!r} is not allowed: it must be a number above 0")
        if max_pins < 1:
            raise ValueError(f"max_pins = {max_pins!r} is not allowed: it must be a whole number from 1")
        self.policy = policy
        self._pins = Pins(pin_seconds, max_pins)
        self._fleet = Fleet(self._pins.tokens, bound)

    @property
    def pins(self) -> Mapping[str, str]:
        """The engine of each conversation that is pinned. Empty under a policy that does not pin."""
        return self._pins

    def resident_tokens(self, engine: str) -> int:
        """Tokens of the conversations that live on an engine, whether their agents are away or not. They may be more than its KV
        cache holds. 0 under a policy that does not pin."""
        return self._pins.tokens(engine)

    def conversations(self, engine: str) -> int:
        """Conversations that are pinned to an engine. 0 under a policy that does not pin."""
        return self._pins.conversations(engine)

    def engines(self, names: Iterable[str], now: float) -> None:
        """These engines live, and no others. A pin to another one moves at its conversation's next turn; if that engine is back
        before, the pin stays."""
        self._fleet.set(names)
        self._pins.expire(now)

    def report(self, engine: str, load: EngineLoad, now: float) -> None:
        """What an engine says of itself. Calls placed before are taken to be in it, unless it is the last report once more."""
        self._fleet.report(engine, load, now)
        self._pins.expire(now)

    def place(
        self, session: str, tokens: int, now: float, parent: str | None = None, known: str | None = None
    ) -> Decision:
        """Where a call goes. `finished` has to be told of every call that was placed, however it ended.

        Args:
            session: of its conversation; "" if there is none. A call without one, or with one longer than `LONGEST_NAME`, is not
                pinned.
            tokens: of its whole prompt.
            parent: session of the agent that started this one.
            known: under `conserve` and `sticky`, the engine that the call has gone to already. Its conversation is pinned there
                unless it is pinned.

        Raises:
            NoEngineError: no engine lives.
        """
        if not self._fleet:
            raise NoEngineError("no engine lives")
        self._pins.expire(now)
        self._pins.drop_expired(session, now)
        was = self._pins.get(session)
        reason: Reason
        if was is None and known is not None and known in self._fleet:
            engine, reason = known, "pinned"
        else:
            engine, reason = self._choose(session, tokens, was, parent)
        pins = reason not in ("short", "per-call") and 0 < len(session) <= LONGEST_NAME
        if pins:
            self._pins.pin(session, engine, tokens, now)
        self._fleet.sent(engine, tokens)
        return Decision(engine, reason, was if pins and was != engine else None)

    def finished(self, session: str, engine: str, context_tokens: int, now: float) -> None:
        """A call that was placed on an engine ended there, and left a context of so many tokens, its answer included."""
        self._fleet.ended(engine, context_tokens)
        self._pins.ended(session, engine, context_tokens, now)

    def ended(self, session: str, now: float) -> None:
        """A conversation is over: nothing of it is needed any more."""
        self._pins.forget(session)
        self._pins.expire(now)

    def _choose(self, session: str, tokens: int, was: str | None, parent: str | None) -> tuple[str, Reason]:
        fleet = self._fleet
        match self.policy:
            case "round-robin":
                return fleet.next(), "per-call"
            case "least-loaded":
                return fleet.least_loaded(session), "per-call"
            case "hash":
                return rendezvous(session, fleet), "per-call"
            case "autellix" if tokens <= SHORT_TOKENS:
                return fleet.least_loaded(session), "short"
        if was is not None and was in fleet:
            return was, "pinned"
        reason: Reason = "first" if was is None else "moved"
        home = self._pins.get(parent) if parent is not None and was is None and self.policy != "sticky" else None
        if home is not None and home in fleet:
            if fleet.is_within(home, tokens, fleet.room(tokens)):
                return home, "parent"
            reason = "crowded"
        engine = fleet.roomiest(session, tokens) if self.policy == "conserve" else fleet.least_loaded(session)
        return engine, "parent" if engine == home else reason
