"""CUDA: what the stream lane measures: its rates, and the time its launches take from the thread that launches decode steps."""

from collections import deque
from math import inf

from vllm_agentserve.lanes.cuda.chunk_in_flight import ChunkInFlight
from vllm_agentserve.policy.slots import chunk_alone

RECENT = 4
"""Chunks on the whole device whose slowest rate counts: the next one may continue a longer context."""
HOST_BOUND = 1.1
"""A chunk that took less than so many times its launch may have waited for the host kernel by kernel: it gives no rate."""
GROWTH = 1.25
"""After such a chunk the rate is assumed to be higher by this factor, until a chunk is long enough to measure."""


class Pace:
    """Rates of the lane, in the host's seconds unless they say otherwise.

    The rate beside decodes counts the time from the launch of a chunk to the launch of the next one; when no other job waits, to
    the moment when the host sees that the chunk has ended. So it includes the waiting between two steps. Only chunks launched
    beside a decode step count.

    The rate on the whole device counts the device's own time for a chunk. Chunks beside which a decode step came do not count,
    nor does a short rest of a prompt.

    Args:
        base: tokens of a chunk on the smallest prefill slot.
    """

    def __init__(self, base: int) -> None:
        self._base = base
        self.target_ms = 0.0
        """Target of a step, from the scheduler; 0 while it is not known."""
        self._last_stream = -inf
        """When a stream was last known to exist."""
        self._alone: deque[float] = deque(maxlen=RECENT)
        """Tokens per second on the whole device."""
        self._guess: float | None = None
        """What that is assumed to be while no chunk has given it."""
        self._launch_ms = 0.0
        """Of the last chunk on the whole device."""
        self._open: tuple[int, float, float] | None = None
        """Tokens of the last chunk, when it was launched and when it was seen to have ended, until the next one is launched."""
        self.tokens, self.seconds = 0, 0.0
        self.launches, self.launch_s = 0, 0.0

    def stream_exists(self, now: float) -> None:
        """A step decodes, or a prompt of the lane is computed and its answer begins."""
        self._last_stream = now

    def tokens_alone(self, longest: int, now: float) -> int:
        """Tokens of a chunk on the whole device, see `policy.slots.chunk_alone`."""
        rate = min(self._alone, default=self._guess)
        quiet_s = now - self._last_stream
        return chunk_alone(self._base, longest, rate, self.target_ms, quiet_s, self._launch_ms)

    def launching(self, now: float) -> None:
        """The next chunk is about to be launched."""
        self._close(now)

    def idle(self) -> None:
        """There is no next chunk."""
        if self._open is not None:
            self._close(self._open[2])

    def finished(self, in_flight: ChunkInFlight, now: float) -> None:
        """A chunk was seen to have ended; one that failed does not count."""
        if in_flight.error is not None:
            return
        tokens = in_flight.chunk.tokens
        if in_flight.beside:
            self._open = tokens, in_flight.launched, now
            self.launches += 1
            self.launch_s += in_flight.launch_s
        elif not in_flight.joined and in_flight.full and (seconds := in_flight.seconds()) > 0.0:
            self._alone_took(tokens, seconds, in_flight.launch_s)

    def _alone_took(self, tokens: int, seconds: float, launch_s: float) -> None:
        self._launch_ms = 1000.0 * launch_s
        rate = tokens / seconds
        if seconds > HOST_BOUND * launch_s:
            self._alone.append(rate)
            self._guess = None
            return
        rate = max(rate, self._guess or 0.0)
        if self._alone:
            # The slowest rate made the chunk this short. It is not the device's, or the chunk would have taken longer.
            slowest = min(self._alone)
            self._alone.remove(slowest)
            rate = max(rate, slowest)
        self._guess = GROWTH * rate

    def _close(self, end: float) -> None:
        if self._open is not None:
            tokens, launched, _ = self._open
            self._open = None
            self.tokens += tokens
            self.seconds += end - launched

    def take(self) -> tuple[int, float, int, float]:
        """Tokens and seconds beside decodes, launches and their host seconds, since the last call."""
        taken = self.tokens, self.seconds, self.launches, self.launch_s
        self.tokens, self.seconds = 0, 0.0
        self.launches, self.launch_s = 0, 0.0
        return taken
