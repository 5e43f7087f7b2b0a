"""Records of the requests of one part of a round, made as they end."""

from collections.abc import Sequence
from time import perf_counter

from vllm_agentserve.bench.records import LEAD, Record
from vllm_agentserve.bench.sessions import Session


class Recorder:
    """Makes records and keeps them, in the order in which requests end.

    Args:
        arm, round_number, part: what the records are to say.
    """

    def __init__(self, arm: str, round_number: int, part: str) -> None:
        self._labels = arm, round_number, part
        self.records: list[Record] = []
        self.began = perf_counter()
        """When the part began, in seconds of `perf_counter()`; times in records count from then on."""

    def begin(self) -> float:
        """The part begins now; says when that is."""
        self.began = perf_counter()
        return self.began

    def add(
        self,
        session: Session,
        number: int,
        prompt: str,
        prompt_tokens: int,
        cached_tokens: int | None,
        sent: float,
        ended: float,
        stamps: Sequence[float],
        error: str | None = None,
    ) -> None:
        """A turn of a session has ended.

        Args:
            prompt: digest of the prompt, see `records.digest`.
            sent, ended, stamps: in seconds of `perf_counter()`.
            error: why it failed; None if it ended well.
        """
        arm, round_number, part = self._labels
        self.records.append(
            Record(
                arm=arm,
                round=round_number,
                part=LEAD if session.lead else part,
                session=session.name,
                agent=session.agent,
                kind=session.kind,
                phase=session.phase(number),
                turn=number,
                prompt=prompt,
                prompt_tokens=prompt_tokens,
                wanted_tokens=session.turns[number].answer,
                cached_tokens=cached_tokens,
                sent_us=self._micros(sent),
                ended_us=self._micros(ended),
                stamps_us=[self._micros(stamp) for stamp in stamps],
                error=error,
                program=session.program,
            )
        )

    def _micros(self, seconds: float) -> int:
        return int((seconds - self.began) * 1e6)
