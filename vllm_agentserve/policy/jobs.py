"""The jobs of a lane, cut into chunks: which one runs next, and how far each has come."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_agentserve.policy.preemption import FIRST, Rank
from vllm_agentserve.policy.slots import Waiting, next_job


class Drained(NamedTuple):
    """What became of a worker's jobs when all were taken back, by request.

    Args:
        ended: nothing writes their blocks any more. They are named here, and not again with a step.
        left: the lane has not let go of them in time; a later step reports them.
    """

    ended: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Job:
    """The uncached part of one prompt.

    Args:
        request_id: whose it is.
        token_ids: the prompt up to and including its last token, which the lane does not compute.
        block_ids: the KV blocks of the whole prompt, per KV cache group.
        start: first token the lane computes; everything before is in the blocks already.
        resume: whether the prompt continues a cached context, which goes before those that begin one.
        rank: class and level of the call, which goes before that.
    """

    request_id: str
    token_ids: list[int]
    block_ids: tuple[list[int], ...]
    start: int
    resume: bool = False
    rank: Rank = FIRST

    @property
    def end(self) -> int:
        """One past the last token the lane computes: the prompt's last one is left to the decode lane, which samples."""
        return len(self.token_ids) - 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes ids are four bytes each: a list of numbers takes several times as long to pickle."""
        blocks = tuple(_packed(ids) for ids in self.block_ids)
        return _unpacked, (self.request_id, _packed(self.token_ids), blocks, self.start, self.resume, self.rank)


def _packed(ids: Sequence[int]) -> Any:
    try:
        return array("i", ids).tobytes()
    except (TypeError, OverflowError):
        return ids  # whoever computes with it says what is wrong


def _unpacked(request_id: str, token_ids: Any, block_ids: tuple[Any, ...], start: int, resume: bool, rank: Rank) -> Job:
    tokens, *blocks = [array("i", ids).tolist() if isinstance(ids, bytes) else ids for ids in (token_ids, *block_ids)]
    return Job(request_id, tokens, tuple(blocks), start, resume, rank)


@dataclass(frozen=True)
class JobChunk:
    """Tokens [position, position + tokens) of a job; `first` when nothing of it ran before, `last` when nothing will after."""

    job: Job
    position: int
    tokens: int
    first: bool
    last: bool


class ChunkQueue:
    """Every provider of a lane has one: order is decided anew for every chunk, by `policy.slots.next_job`."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._position: dict[str, int] = {}
        self._taken = 0
        self._came: dict[str, int] = {}
        """How many chunks had been taken when a job came or got its last chunk."""

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._jobs

    def add(self, job: Job) -> None:
        self._jobs[job.request_id] = job
        self._came[job.request_id] = self._taken

    def take(self, tokens: int) -> JobChunk:
        """The next chunk of at most `tokens` tokens; counts as run. Raises `LookupError` when there is no job."""
        if not self._jobs:
            raise LookupError("the lane has no job")
        waiting = [
            Waiting(
                name,
                job.resume,
                job.end - self._position.get(name, job.start),
                self._taken - self._came[name],
                job.rank,
            )
            for name, job in self._jobs.items()
        ]
        name = next_job(waiting)
        job = self._jobs[name]
        position = self._position.get(name, job.start)
        length = min(tokens, job.end - position)
        first = name not in self._position
        self._position[name] = position + length
        self._taken += 1
        self._came[name] = self._taken
        return JobChunk(job, position, length, first, position + length >= job.end)

    def drop(self, request_id: str) -> bool:
        """Forgets a job; returns whether a chunk of it has been taken."""
        self._jobs.pop(request_id, None)
        self._came.pop(request_id, None)
        return self._position.pop(request_id, None) is not None
