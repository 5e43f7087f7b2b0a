"""What a prefill lane is given and what it answers: jobs, filled chunk by chunk, and their outcomes."""

from dataclasses import dataclass


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
