"""Programs as they were completed: a session and all that forked from it, from the first request to the last token."""

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_agentserve.bench.records import Record


@dataclass(frozen=True)
class ProgramFigures:
    """One program of one round: a unit that is resampled, as sessions are.

    Args:
        tokens: generated.
        seconds: from its first request to its last token, tools included.
        failed: requests of it that failed; such a program was not completed, and its time says nothing.
        complete: whether it was completed in all arms; if not, its time counts in none.
    """

    round: int
    name: str
    kind: str
    tokens: int
    seconds: float
    failed: int
    complete: bool = True

    @property
    def per_token_ms(self) -> float | None:
        """Completion time per generated token (Autellix's measure); None for a program that was not completed."""
        return None if self.failed or not self.complete or not self.tokens else self.seconds / self.tokens * 1000


def program_figures(number: int, records: Iterable[Record]) -> list[ProgramFigures]:
    """The programs of one arm in one round; records of workloads without programs have none."""
    by_program: dict[str, list[Record]] = {}
    for record in records:
        if record.program:
            by_program.setdefault(record.program, []).append(record)
    return [
        ProgramFigures(
            number,
            name,
            own[0].kind,
            sum(len(record.stamps_us) for record in own),
            (max(record.ended_us for record in own) - min(record.sent_us for record in own)) / 1e6,
            sum(record.error is not None for record in own),
        )
        for name, own in by_program.items()
    ]
