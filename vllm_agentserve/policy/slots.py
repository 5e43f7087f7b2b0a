"""How the device is divided while both lanes have work: the ladder of slots, which of them, which job next, how long a chunk."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from vllm_agentserve.policy.preemption import FIRST, Rank

PATIENCE_CHUNKS = 64
"""A job that others have overtaken for so many chunks goes first."""


def core_ladder(cores: int, share: float | None = None) -> list[int]:
    """Cores of the decode lane on every slot of a CPU, growing; the prefill lane has the others.

    Args:
        cores: of the worker, at least 2.
        share: the user's own, in (0, 1), rounded to what gives both lanes a core; None for a quarter, half and three
            quarters, as far as they differ and decode keeps the larger half of two or three cores.

    Raises:
        ValueError: fewer than two cores.
    """
    if cores < 2:
        raise ValueError(f"two lanes need two cores, there is {cores}")
    if share is not None:
        return [min(max(round(cores * share), 1), cores - 1)]
    if cores < 4:
        return [(cores + 1) // 2]
    return sorted({cores // 4, cores // 2, cores * 3 // 4})


class SlotChooser:
    """Climbs the ladder: the smallest decode slot on which streams keep their target, so that prefill has the most.

    It begins at the largest decode slot. It steps down when even a step that grew in proportion to the units lost would
    stay within the target, and up as soon as what it sees does not. Decodes bound by memory bandwidth grow less than in
    proportion, so it comes down step by step, as measured.

    Args:
        decode_units: of every slot, growing, at least one; cores or streaming multiprocessors.
    """

    MARGIN = 0.85
    """Steps are planned to this share of the target, since the slowest of them decide whether it is kept."""
    WEIGHT = 0.1
    """Of a new interval in the average."""
    SETTLE = 8
    """Intervals on a slot before it is left again."""
    RETRY = 512
    """The same after a smaller decode slot was too small, so that the two do not alternate; twice as many whenever that slot is
    too small again, up to `RETRIES` times as many."""
    RETRIES = 64
    OUTLIER = 5.0
    """An interval so many times the average is a stall, which says nothing of the slot, unless the next one is as long, or the
    last one was fewer than `SETTLE` intervals ago."""

    def __init__(self, decode_units: Sequence[int]) -> None:
        self._units = list(decode_units)
        self._seen = 0
        self._average_ms = 0.0
        self._stay = self.SETTLE
        self._stalled = False
        self._since_stall = self.SETTLE
        self._retry = dict.fromkeys(range(len(self._units)), self.RETRY)
        """By slot: how long the next larger one is kept after this one was too small."""
        self.slot = len(self._units) - 1

    def observe(self, interval_ms: float) -> None:
        """Takes in the time between two tokens of a stream, beside a working lane on the present slot."""
        stalled, self._stalled = self._stalled, 0.0 < self.OUTLIER * self._average_ms < interval_ms
        self._since_stall += 1
        if self._stalled and not stalled and self._since_stall > self.SETTLE:
            self._since_stall = 0
            return
        if self._seen == 1 and self.OUTLIER * interval_ms < self._average_ms:
            self._seen = 0  # the first one was a stall
        self._seen += 1
        weight = max(self.WEIGHT, 1.0 / self._seen)
        self._average_ms += weight * (interval_ms - self._average_ms)

    def choose(self, target_ms: float) -> int:
        """The slot for the next step."""
        limit = self.MARGIN * target_ms
        if self._seen >= self.RETRY:
            self._retry[self.slot] = self.RETRY
        if self._seen >= self.SETTLE and self._average_ms > limit and self.slot + 1 < len(self._units):
            stay = self._retry[self.slot]
            self._retry[self.slot] = min(2 * stay, self.RETRIES * self.RETRY)
            self._move(self.slot + 1, stay)
        elif self._seen >= self._stay and self.slot > 0:
            grown = self._average_ms * self._units[self.slot] / self._units[self.slot - 1]
            if grown <= limit:
                self._move(self.slot - 1, self.SETTLE)
        return self.slot

    def _move(self, slot: int, stay: int) -> None:
        self.slot = slot
        self._stay = stay
        self._seen = 0
        self._average_ms = 0.0
        self._stalled = False


class LaneRate:
    """Tokens per second the lane computes beside decodes, learned from what it reports.

    Args:
        prefill_share: of the device; until something was reported the lane is taken to be that share of it.
    """

    WEIGHT = 0.2
    DRIFT = 0.01
    """Of the way from what was measured to the share of the device, for every prompt that did not go to the lane because of it. A
    wrong measurement would otherwise never be corrected, since only prompts that go there measure."""

    TRY = 256
    """After so many such prompts the next one goes to the lane whatever is known: the share may be wrong too."""

    def __init__(self, prefill_share: float) -> None:
        self.prefill_share = prefill_share
        self._measured: float | None = None
        self._passed = 0
        self._renewed = False

    def report(self, tokens: int, seconds: float) -> None:
        """Takes in chunks: tokens and the time they took; nothing where either is 0."""
        if tokens <= 0 or seconds <= 0.0:
            return
        rate = tokens / seconds
        before = rate if self._measured is None or self._renewed else self._measured
        self._measured = before + self.WEIGHT * (rate - before)
        self._passed, self._renewed = 0, False

    def renew(self) -> None:
        """The lane is another one: its first report takes the place of what is known."""
        self._renewed = True

    def passed_over(self) -> None:
        """A prompt went elsewhere because the lane was taken to be slower."""
        self._passed += 1

    def tokens_per_s(self, whole_device: float | None) -> float | None:
        """The rate; before the first report it follows from that of the `whole_device`, None where that is unknown."""
        share = None if whole_device is None else self.prefill_share * whole_device
        if self._measured is None or share is None:
            return share if self._measured is None else self._measured
        if self._passed and self._passed % self.TRY == 0:
            return inf
        drifted = 1.0 - (1.0 - self.DRIFT) ** self._passed
        return self._measured + drifted * max(share - self._measured, 0.0)


@dataclass(frozen=True)
class Waiting:
    """A job of the lane between two chunks.

    Args:
        request_id: whose it is.
        resume: whether it continues a cached context.
        left: tokens to compute, at least 1.
        passed: chunks of others that ran since it came or had one itself.
        rank: class and level of the call when it came.
    """

    request_id: str
    resume: bool
    left: int
    passed: int = 0
    rank: Rank = FIRST


def next_job(waiting: Sequence[Waiting]) -> str:
    """Which job gets the next chunk: overdue ones, the longest overtaken first; then by class and level of their calls, then
    resume prefills, then the one with the least left, then the first.

    Least left first (SRPT) minimises the mean time to the first token.

    Raises:
        ValueError: nobody waits.
    """

    def key(one: Waiting) -> tuple[int, Rank, bool, int]:
        overdue = one.passed >= PATIENCE_CHUNKS
        return -one.passed if overdue else 0, one.rank, not one.resume, one.left

    return min(waiting, key=key).request_id


def chunk_length(base: int, units: int, smallest: int) -> int:
    """Tokens of a chunk on `units` of the device when `base` tokens are right for the `smallest` prefill slot: in proportion,
    so that a chunk takes about as long on every slot, in multiples of 64, and at most eight times as long."""
    return base if units <= smallest else max(min(base * units // smallest, 8 * base) // 64 * 64, base)


FIRST_ALONE = 256
"""Tokens of a chunk on the whole device before it is known how long it takes."""
QUIET_S = 10.0
"""No stream for so long: the next one is not expected within a chunk."""


def chunk_alone(
    base: int, longest: int, tokens_per_s: float | None, target_ms: float, quiet_s: float, launch_ms: float = 0.0
) -> int:
    """Tokens of a chunk on the whole device, which no decode step uses just now. A stream that begins meanwhile shares the device
    with the chunk until its end, so the chunk takes no longer than a step may, or than its launch takes the host: a shorter one
    would take as long.

    Args:
        base: tokens of a chunk on the smallest prefill slot.
        longest: tokens it never exceeds; what it has when no stream was there for `QUIET_S`.
        tokens_per_s: what the lane computes on the whole device; None before it has.
        target_ms: of a step; not above 0 while it is not known.
        quiet_s: time since a stream was last there.
        launch_ms: of the host, for a chunk of any length.

    Returns:
        Tokens, in multiples of 64 but for `longest`; 64 at least.
    """
    if quiet_s >= QUIET_S:
        return longest
    if tokens_per_s is None or not 0.0 < target_ms < inf:
        return min(base, FIRST_ALONE, longest)
    return min(max(int(tokens_per_s * max(target_ms, launch_ms) / 1000.0) // 64 * 64, 64), longest)
