"""What is kept of every request, and the files it is kept in: one JSON object a line, every token's time included."""

import gzip
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec


def digest(token_ids: Sequence[int]) -> str:
    """Tells prompts apart, in few characters."""
    return hashlib.sha256(array("i", token_ids).tobytes()).hexdigest()[:12]


class Record(msgspec.Struct, kw_only=True):
    """One request. Times in microseconds since the part of the round it belongs to began.

    Args:
        part: "measured", or "alone" for the isolated run behind the thresholds.
        kind: "agent", "chat" or "batch"; phase: "cold" or "resume".
        prompt: digest of the prompt's token ids, to see whether two arms got the same.
        cached_tokens: prompt tokens found in the prefix cache, where the server tells.
        stamps_us: arrival of every token.
        program: the program it is part of, where the workload consists of programs.
    """

    arm: str
    round: int
    part: str
    session: str
    agent: str
    kind: str
    phase: str
    turn: int
    prompt: str
    prompt_tokens: int
    wanted_tokens: int
    cached_tokens: int | None = None
    sent_us: int
    ended_us: int
    stamps_us: list[int]
    error: str | None = None
    program: str = ""

    @property
    def ttft_ms(self) -> float:
        return (self.stamps_us[0] - self.sent_us) / 1000

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token after the first; None for a single token."""
        if len(self.stamps_us) < 2:
            return None
        return (self.stamps_us[-1] - self.stamps_us[0]) / 1000 / (len(self.stamps_us) - 1)


class RoundRecord(msgspec.Struct, kw_only=True):
    """One arm in one round: when, how long each part took, under which conditions, and what the server counted."""

    arm: str
    round: int
    began: str
    seconds: dict[str, float] = {}
    conditions: dict[str, Any] = {}
    polluted: list[str] = []
    server: dict[str, float] = {}
    kv_tokens: int | None = None
    """Size of the KV cache, as the server states it."""
    software: str = ""
    """Name and version, as the server states them."""
    gpu: dict[str, float] = {}
    error: str | None = None


class Results:
    """A folder of results that is written while the experiment runs and read again for the report.

    Raises:
        FileExistsError: on `create`, when the folder already holds results.
    """

    REQUESTS, ROUNDS, EXPERIMENT = "requests.jsonl", "rounds.jsonl", "experiment.json"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, experiment: dict[str, Any]) -> "Results":
        results = cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / cls.EXPERIMENT).exists():
            raise FileExistsError(f"{folder} already holds results: name another folder with --output")
        (folder / cls.EXPERIMENT).write_text(json.dumps(experiment, indent=1) + "\n")
        return results

    def add(self, records: list[Record]) -> None:
        self._append(self.REQUESTS, records)

    def add_round(self, record: RoundRecord) -> None:
        self._append(self.ROUNDS, [record])

    def _append(self, name: str, items: list[Any]) -> None:
        with (self.folder / name).open("ab") as file:
            for item in items:
                file.write(msgspec.json.encode(item) + b"\n")

    def experiment(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / self.EXPERIMENT).read_text()))

    def requests(self) -> list[Record]:
        return list(self._read(self.REQUESTS, Record))

    def rounds(self) -> list[RoundRecord]:
        return list(self._read(self.ROUNDS, RoundRecord))

    def _read(self, name: str, kind: Any) -> Iterator[Any]:
        plain, packed = self.folder / name, self.folder / (name + ".gz")
        decode = msgspec.json.Decoder(kind).decode
        if plain.exists():
            yield from map(decode, plain.read_bytes().splitlines())
        elif packed.exists():
            yield from map(decode, gzip.decompress(packed.read_bytes()).splitlines())
