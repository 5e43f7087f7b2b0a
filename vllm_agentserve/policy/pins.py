"""Which engine each conversation lives on, and how many tokens of KV cache the conversations of an engine take.

vLLM's own figure of used KV blocks leaves out conversations whose agent is away, so it is counted here. Most clients do not say
when a conversation is over. One that has been away for longer than nearly all gaps seen lately keeps its pin, but is no
longer counted.

The table is bounded: pins expire, and where there are too many, conversations of one call go first. A client that opens a
new session with each call so fills a quarter of the table at most, once the rest of it is taken by others.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from vllm_agentserve.policy.gaps import MIDDLES_S, Gaps

GONE = 0.03
"""A conversation is not counted any more when this share of the gaps is longer than it has been away."""
LONGEST_AWAY_S = 600.0
"""Nor after this time, which also holds until gaps were seen."""
GAPS_BETWEEN = 16
"""Gaps after which that time is worked out again."""
AT_ONCE = 64
"""Pins that one call forgets at most, so that none takes long."""


@dataclass(slots=True)
class Pin:
    """A conversation.

    Args:
        engine: where it lives.
        tokens: of its context, as far as known.
        used_s: when its last call was placed or ended.
        running: calls that have not ended.
        counted: whether its tokens are among those of its engine.
    """

    engine: str
    tokens: int
    used_s: float
    running: int = 1
    counted: bool = True


class Pins(Mapping[str, str]):
    """The engines of conversations, by session.

    Args:
        pin_seconds: a pin expires when its conversation has done nothing for so long.
        max_pins: of all conversations together.
    """

    def __init__(self, pin_seconds: float, max_pins: int) -> None:
        self._pin_seconds = pin_seconds
        self._max_pins = max_pins
        self._new: OrderedDict[str, Pin] = OrderedDict()
        """Conversations of one call, the longest unused first."""
        self._returned: OrderedDict[str, Pin] = OrderedDict()
        self._counted: OrderedDict[str, None] = OrderedDict()
        """Conversations that are counted, the longest unused first."""
        self._tokens: dict[str, int] = {}
        self._homes: dict[str, int] = {}
        """Conversations by engine."""
        self._gaps = Gaps()
        self._gaps_seen = 0
        self.away_s = min(pin_seconds, LONGEST_AWAY_S)
        """A conversation that is away for longer is not counted."""

    def __getitem__(self, session: str) -> str:
        pin = self._find(session)
        if pin is None:
            raise KeyError(session)
        return pin.engine

    def __iter__(self) -> Iterator[str]:
        return chain(self._new, self._returned)

    def __len__(self) -> int:
        return len(self._new) + len(self._returned)

    def tokens(self, engine: str) -> int:
        """Tokens of the conversations that live on an engine and are counted."""
        return self._tokens.get(engine, 0)

    def conversations(self, engine: str) -> int:
        """Conversations that live on an engine, whether they are counted or not."""
        return self._homes.get(engine, 0)

    def pin(self, session: str, engine: str, tokens: int, now: float) -> None:
        """A call of so many tokens goes to an engine, where its conversation lives from now on."""
        pin = self._find(session)
        if pin is None:
            pin = self._new[session] = Pin(engine, tokens, now)
            self._settle(engine, 1)
            self._add(engine, tokens)
        else:
            if not pin.running:
                self._gap(now - pin.used_s)
            self._uncount(pin)
            if pin.engine != engine:
                self._settle(pin.engine, -1)
                self._settle(engine, 1)
                pin.engine, pin.running = engine, 0
            pin.tokens = max(pin.tokens, tokens)
            pin.running += 1
            self._new.pop(session, None)
            self._returned[session] = pin
            self._count(pin)
        self._touch(session, pin, now)
        if len(self) > self._max_pins:
            few = len(self._new) <= max(self._max_pins // 4, 1)
            self.forget(next(iter(self._returned if few else self._new)))

    def ended(self, session: str, engine: str, tokens: int, now: float) -> None:
        """A call ended on an engine with a context of so many tokens. Nothing changes unless its conversation lives there."""
        pin = self._find(session)
        if pin is None or pin.engine != engine:
            return
        self._uncount(pin)
        pin.tokens = tokens
        pin.running = max(pin.running - 1, 0)
        self._count(pin)
        self._touch(session, pin, now)

    def forget(self, session: str) -> None:
        pin = self._find(session)
        if pin is not None:
            self._uncount(pin)
            self._settle(pin.engine, -1)
            self._counted.pop(session, None)
            del self._table(session)[session]

    def expire(self, now: float) -> None:
        """Forgets what has expired, and stops counting conversations that have been away for long; a part of them at a time."""
        for table in (self._new, self._returned):
            for _ in range(AT_ONCE):
                session = next(iter(table), None)
                if session is None or now - table[session].used_s <= self._pin_seconds:
                    break
                self.forget(session)
        for _ in range(AT_ONCE):
            session = next(iter(self._counted), None)
            if session is None:
                break
            pin = self._table(session)[session]
            if now - pin.used_s <= self.away_s:
                break
            if pin.running:
                # A call that takes long. It is looked at again when all others were.
                self._counted.move_to_end(session)
            else:
                self._uncount(pin)
                del self._counted[session]

    def drop_expired(self, session: str, now: float) -> None:
        """Forgets this conversation if it has expired."""
        pin = self._find(session)
        if pin is not None and now - pin.used_s > self._pin_seconds:
            self.forget(session)

    def _find(self, session: str) -> Pin | None:
        return self._new.get(session) or self._returned.get(session)

    def _table(self, session: str) -> OrderedDict[str, Pin]:
        return self._new if session in self._new else self._returned

    def _touch(self, session: str, pin: Pin, now: float) -> None:
        pin.used_s = now
        self._table(session).move_to_end(session)
        self._counted[session] = None
        self._counted.move_to_end(session)

    def _count(self, pin: Pin) -> None:
        if not pin.counted:
            pin.counted = True
            self._add(pin.engine, pin.tokens)

    def _uncount(self, pin: Pin) -> None:
        if pin.counted:
            pin.counted = False
            self._add(pin.engine, -pin.tokens)

    def _add(self, engine: str, tokens: int) -> None:
        left = self._tokens.get(engine, 0) + tokens
        if left:
            self._tokens[engine] = left
        else:
            self._tokens.pop(engine, None)

    def _settle(self, engine: str, more: int) -> None:
        left = self._homes.get(engine, 0) + more
        if left:
            self._homes[engine] = left
        else:
            self._homes.pop(engine, None)

    def _gap(self, gap_s: float) -> None:
        """A conversation came back after so long."""
        self._gaps.add(gap_s)
        self._gaps_seen += 1
        if self._gaps_seen % GAPS_BETWEEN == 0:
            longest = min(self._pin_seconds, LONGEST_AWAY_S)
            usual = (middle for middle in MIDDLES_S if self._gaps.longer(middle) < GONE)
            self.away_s = min(next(usual, longest), longest)
