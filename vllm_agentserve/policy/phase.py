"""The three kinds of work an agent loop makes (AgentServe, arXiv 2603.10342, section 3)."""

import enum
from collections import OrderedDict


class Phase(enum.IntEnum):
    """What a sequence does in a step."""

    COLD_PREFILL = 0
    """A prompt that the KV cache does not hold yet: the long system prompt of a new agent."""
    RESUME_PREFILL = 1
    """New tokens appended to a context that is mostly cached: a tool result."""
    DECODE = 2
    """All tokens but the last sampled one are computed: the agent's answer, a token per step."""

    @property
    def label(self) -> str:
        return _LABELS[self]


_LABELS = {Phase.COLD_PREFILL: "cold_prefill", Phase.RESUME_PREFILL: "resume_prefill", Phase.DECODE: "decode"}


def classify(cached_tokens: int, uncached_tokens: int, known_session: bool = False, decoding: bool = False) -> Phase:
    """Tags a sequence at admission, from what is observed there and never from a guess about its future.

    Args:
        cached_tokens: tokens of the sequence whose KV is already there.
        uncached_tokens: tokens still to compute, at least 1.
        known_session: an earlier request of the same session has run on this engine.
        decoding: the sequence has sampled a token since it was admitted.

    A sequence is a resume prefill when some of its context is cached and either its session is known or at least half of
    it is cached. So a new agent that shares a cached system prompt resumes it, and an agent whose context was evicted is
    cold again.
    """
    if decoding and uncached_tokens <= 1:
        return Phase.DECODE
    if cached_tokens > 0 and (known_session or cached_tokens >= uncached_tokens):
        return Phase.RESUME_PREFILL
    return Phase.COLD_PREFILL


class SessionTable:
    """The sessions seen lately, bounded; the least recently seen one is forgotten first.

    Args:
        capacity: how many session ids are remembered, at least 1.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._capacity = capacity

    def __contains__(self, session_id: str | None) -> bool:
        return session_id is not None and session_id in self._seen

    def __len__(self) -> int:
        return len(self._seen)

    def touch(self, session_id: str | None) -> None:
        """Remembers the session as the latest seen; a request without a session id leaves no trace."""
        if session_id is None:
            return
        self._seen[session_id] = None
        self._seen.move_to_end(session_id)
        if len(self._seen) > self._capacity:
            self._seen.popitem(last=False)
