"""How the device is divided while both lanes have work: the ladder of slots, which of them, which job next, how long a chunk."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    """The same after a smaller decode slot was too small, so that the two do not alternate."""

    def __init__(self, decode_units: Sequence[int]) -> None:
        self._units = list(decode_units)
        self._seen = 0
        self._average_ms = 0.0
        self._stay = self.SETTLE
        self.slot = len(self._units) - 1

    def observe(self, interval_ms: float) -> None:
        """Takes in the time between two tokens of a stream, beside a working lane on the present slot."""
        self._seen += 1
        weight = max(self.WEIGHT, 1.0 / self._seen)
        self._average_ms += weight * (interval_ms - self._average_ms)

    def choose(self, target_ms: float) -> int:
        """The slot for the next step."""
        limit = self.MARGIN * target_ms
        if self._seen >= self.SETTLE and self._average_ms > limit and self.slot + 1 < len(self._units):
            self._move(self.slot + 1, self.RETRY)
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


class LaneRate:
    """Tokens per second the lane computes beside decodes, learned from what it reports.

    Args:
        prefill_share: of the device; until something was reported the lane is taken to be that share of it.
    """

    WEIGHT = 0.2

    def __init__(self, prefill_share: float) -> None:
        self.prefill_share = prefill_share
        self._measured: float | None = None

    def report(self, tokens: int, seconds: float) -> None:
        """Takes in chunks: tokens and the time they took; nothing where either is 0."""
        if tokens <= 0 or seconds <= 0.0:
            return
        rate = tokens / seconds
        self._measured = rate if self._measured is None else self._measured + self.WEIGHT * (rate - self._measured)

    def tokens_per_s(self, whole_device: float | None) -> float | None:
        """The rate; before the first report it follows from that of the `whole_device`, None where that is unknown."""
        if self._measured is not None:
            return self._measured
        return None if whole_device is None else self.prefill_share * whole_device


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
    """Which job gets the next chunk: overdue ones, then by class and level of their calls, then resume prefills, then the one
    with the least left, then the first.

    Least left first (SRPT) minimises the mean time to the first token.

    Raises:
        ValueError: nobody waits.
    """
    return min(waiting, key=lambda one: (one.passed < PATIENCE_CHUNKS, one.rank, not one.resume, one.left)).request_id


def chunk_length(base: int, units: int, smallest: int) -> int:
    """Tokens of a chunk on `units` of the device when `base` tokens are right for the `smallest` prefill slot: in proportion,
    so that a chunk takes about as long on every slot, in multiples of 64, and at most eight times as long."""
    return base if units <= smallest else max(min(base * units // smallest, 8 * base) // 64 * 64, base)
