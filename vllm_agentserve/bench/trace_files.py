"""What lies in a trace file, one entry after the other: JSON lines, a JSON array, one JSON object, CSV; packed or not."""

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_agentserve.bench.sessions import WorkloadError
from vllm_agentserve.options import read_json

SUFFIXES = (".json", ".jsonl", ".csv", ".gz")
"""Files of a folder that are read."""
MOST = 1e12
"""No number of a trace is larger: tokens or ms."""


@dataclass(frozen=True)
class Entry:
    """One object of a trace.

    Args:
        number: of its line, or its place in an array, from 1.
        where: the file and the line, for messages.
        fields: its values; of CSV all are texts.
    """

    number: int
    where: str
    fields: Mapping[str, Any]
    csv: bool = False

    def wrong(self, what: str) -> WorkloadError:
        return WorkloadError(f"trace {self.where}: {what}")

    def number_of(self, name: str, default: float | None, low: float, whole: bool, high: float = MOST) -> Any:
        """The value of a field; `default` where it is missing or null. Raises `WorkloadError` where it is not allowed."""
        value = self.fields.get(name, default)
        if value is None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= high
            or (whole and value != int(value))
        ):
            kind = "whole number" if whole else "number"
            raise self.wrong(
                f"{name!r} = {value!r} is not allowed: it must be a {kind} of at least {low:g}, at most {high:g}"
            )
        return int(value) if whole else float(value)

    def truth_of(self, name: str) -> bool:
        """The value of a field that is true or false, false where it is missing or null."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(f"{name!r} = {value!r} is not allowed: it must be true or false")
        return bool(value)

    def list_of(self, name: str, kind: type, words: str) -> list[Any]:
        """The value of a field that is a list, empty where it is missing or null."""
        value = self.fields.get(name)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(one, kind) and not isinstance(one, bool) for one in value):
            raise self.wrong(f"{name!r} = {value!r} is not allowed: it must be a list of {words}")
        return value


def read_entries(path: Path) -> Iterator[Entry]:
    """Yields the entries of a file, or of all files of a folder in order of their names; empty lines are skipped."""
    if not path.is_dir():
        yield from entries_of_file(path)
        return
    files = [one for one in sorted(path.iterdir()) if one.is_file() and one.suffix in SUFFIXES]
    if not files:
        raise WorkloadError(f"trace {path} is a folder without files that end in {', '.join(SUFFIXES)}")
    for one in files:
        yield from entries_of_file(one)


def entries_of_file(path: Path) -> Iterator[Entry]:
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        # A byte order mark says nothing of the content.
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise WorkloadError(f"trace {path} cannot be read: {error}") from error
    del content
    begin = text.lstrip()
    if begin.startswith("["):
        yield from entries_of_array(path, text)
    elif not begin or begin.startswith("{") or not looks_like_csv(begin):
        yield from entries_of_lines(path, text)
    else:
        yield from entries_of_csv(path, begin)


def entries_of_csv(path: Path, text: str) -> Iterator[Entry]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in rows:
            if None in row or None in row.values():
                raise WorkloadError(
                    f"trace {path}, line {rows.line_num}: the number of values is not that of the header's"
                )
            yield Entry(rows.line_num, f"{path}, line {rows.line_num}", row, csv=True)
    except csv.Error as error:
        raise WorkloadError(f"trace {path}, line {rows.line_num + 1}: not CSV ({error})") from error


def looks_like_csv(text: str) -> bool:
    """Whether the first line is a header: names with commas between them."""
    names = [name.strip().strip('"') for name in text.partition("\n")[0].split(",")]
    return len(names) > 1 and all(name.replace("_", "").replace(" ", "").isalpha() for name in names)


def entries_of_array(path: Path, text: str) -> Iterator[Entry]:
    try:
        found = read_json(text)
    except ValueError as error:
        raise WorkloadError(
            f"trace {path}, line 1: not JSON ({error}); a file that begins with [ is one array"
        ) from error
    for number, fields in enumerate(found, start=1):
        yield checked(f"{path}, entry {number}", number, fields)


def entries_of_lines(path: Path, text: str) -> Iterator[Entry]:
    """JSON lines, or one object over several lines."""
    for number, words in enumerate(io.StringIO(text), start=1):
        if not words.strip():
            continue
        try:
            fields = read_json(words)
        except ValueError as error:
            if number == 1 and isinstance(whole := object_of(text), dict):
                yield checked(f"{path}", 1, whole)
                return
            raise WorkloadError(f"trace {path}, line {number}: not JSON ({error})") from error
        yield checked(f"{path}, line {number}", number, fields)


def object_of(text: str) -> Any:
    """The object that the whole text is; None where it is not JSON, or several lines of it."""
    try:
        return read_json(text)
    except ValueError:
        return None


def checked(where: str, number: int, fields: Any) -> Entry:
    if not isinstance(fields, dict):
        raise WorkloadError(f"trace {where}: not a JSON object")
    return Entry(number, where, fields)
