"""What a prefill lane is: it takes jobs, fills KV blocks chunk by chunk, and says when each is done."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Job:
    """The uncached part of one prompt.

    Args:
        request_id: whose it is.
        token_ids: the prompt up to and including its last token, which the lane does not compute.
        block_ids: the KV blocks of the whole prompt, per KV cache group.
        start: first token the lane computes; everything before is in the blocks already.
    """

    request_id: str
    token_ids: list[int]
    block_ids: tuple[list[int], ...]
    start: int

    @property
    def end(self) -> int:
        """One past the last token the lane computes: the prompt's last one is left to the decode lane, which samples."""
        return len(self.token_ids) - 1


@dataclass(frozen=True)
class Outcome:
    """A job that holds its blocks no longer; `error` is None when all of it was computed or nobody wants it any more."""

    request_id: str
    error: str | None = None


class PrefillLane(Protocol):
    """A provider of the lane. Nothing here blocks the decode step."""

    def submit(self, job: Job) -> None:
        """Takes a job; its outcome comes with a later `poll`."""

    def cancel(self, request_id: str) -> None:
        """Nobody wants the job any more; its outcome still comes, when no chunk writes its blocks."""

    def poll(self, patience_s: float = 0.0) -> list[Outcome]:
        """The jobs that ended since the last call; waits up to `patience_s` for one."""

    @property
    def busy(self) -> bool:
        """Whether any job was submitted whose outcome has not come."""

    def close(self) -> None:
        """Ends the lane and all it started."""
