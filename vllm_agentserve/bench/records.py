"""What is kept of every request, and the files it is kept in: one JSON object a line, every token's time included."""

import gzip
import hashlib
import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vllm_agentserve.bench.sessions import WorkloadError
from vllm_agentserve.options import read_json

LEAD = "lead"
"""The part of requests whose session is one of the first of steady traffic; they are in no figure."""


def digest(token_ids: Sequence[int]) -> str:
    """Tells prompts apart, in few characters."""
    return hashlib.sha256(array("i", token_ids).tobytes()).hexdigest()[:12]


class Record(msgspec.Struct, kw_only=True):
    """One request. Times in microseconds since the part of the round it belongs to began.

    Args:
        part: "measured", "lead", or "alone" for the isolated run behind the thresholds.
        kind: "agent", "critical", "chat", "batch" or "one-shot"; phase: "cold" or "resume".
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
        FileExistsError: on `create`, when something was measured in the folder already, or it cannot be one.
        WorkloadError: on reading, when a file is damaged.
    """

    FIELDS = ("arms", "rounds", "workload", "machine", "date", "seed", "answers")
    """What a report cannot be made without, of an experiment's description."""
    REQUESTS, ROUNDS, EXPERIMENT = "requests.jsonl", "rounds.jsonl", "experiment.json"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, experiment: dict[str, Any]) -> "Results":
        results = cls(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise FileExistsError(
                f"{folder} cannot be a folder, a file is in its way: name another one with --output"
            ) from error
        if (folder / cls.EXPERIMENT).exists():
            if results.measured():
                raise FileExistsError(f"{folder} already holds results: name another folder with --output")
            (folder / cls.ROUNDS).unlink(missing_ok=True)
        results.describe(experiment)
        return results

    def describe(self, experiment: dict[str, Any]) -> None:
        """Writes what the experiment is, in place of an earlier description."""
        (self.folder / self.EXPERIMENT).write_text(json.dumps(experiment, indent=1) + "\n")

    def add(self, records: list[Record]) -> None:
        self._append(self.REQUESTS, records)

    def add_round(self, record: RoundRecord) -> None:
        self._append(self.ROUNDS, [record])

    def _append(self, name: str, items: list[Any]) -> None:
        with (self.folder / name).open("ab") as file:
            for item in items:
                file.write(msgspec.json.encode(item) + b"\n")

    def measured(self) -> bool:
        """Whether anything was measured; rounds in which no server started are no results."""
        plain = (self.folder / self.REQUESTS).exists() or (self.folder / f"{self.REQUESTS}.gz").exists()
        if plain or not (self.folder / self.ROUNDS).exists():
            return plain
        return any(one.error is None for one in self.rounds())

    def experiment(self) -> dict[str, Any]:
        path = self.folder / self.EXPERIMENT
        try:
            found = read_json(path.read_text())
        except ValueError as error:
            raise WorkloadError(
                f"{path} cannot be read ({error}): name a folder that `agentserve bench run` has written"
            ) from error
        missing = [name for name in self.FIELDS if not isinstance(found, dict) or name not in found]
        if not missing and not found["arms"]:
            missing = ["arms"]
        if missing:
            raise WorkloadError(
                f"{path} does not say {', '.join(missing)}: name a folder that `agentserve bench run` has written"
            )
        return dict(found)

    def requests(self) -> list[Record]:
        return list(self._read(self.REQUESTS, Record))

    def rounds(self) -> list[RoundRecord]:
        return list(self._read(self.ROUNDS, RoundRecord))

    def _read(self, name: str, kind: Any) -> Iterator[Any]:
        plain, packed = self.folder / name, self.folder / (name + ".gz")
        decode = msgspec.json.Decoder(kind).decode
        path = plain if plain.exists() else packed
        if not path.exists():
            return
        try:
            lines = (path.read_bytes() if path is plain else gzip.decompress(path.read_bytes())).splitlines()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise WorkloadError(f"{path} cannot be unpacked ({error}): restore the file, or measure again") from error
        for number, line in enumerate(lines, start=1):
            try:
                yield decode(line)
            except msgspec.MsgspecError as error:
                raise WorkloadError(
                    f"{path}, line {number} cannot be read ({error}): where a run was cut off, delete this line; otherwise "
                    "measure again"
                ) from error
