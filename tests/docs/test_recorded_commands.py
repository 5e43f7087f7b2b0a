"""The commands that results name, on their pages and in their raw data, are commands that can be run today."""

import argparse
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from vllm_agentserve import cli
from vllm_agentserve.bench.arms import parse_arms

RESULTS = ROOT / "docs" / "results"
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
OPTIONS_OF_SERVERS = "vllm serve "
"""Of an arm; the benchmark makes them from the arm's name."""


class Parsed(Exception):
    """Stops a program when its arguments have been read."""


def commands_of(value: Any) -> Iterator[str]:
    """What stands under `command` in raw data, however deep."""
    if isinstance(value, dict):
        for key, own in value.items():
            if key == "command" and isinstance(own, str):
                yield own
            else:
                yield from commands_of(own)
    elif isinstance(value, list):
        for own in value:
            yield from commands_of(own)


def recorded() -> dict[str, str]:
    """By command: a file that names it."""
    found: dict[str, str] = {}
    for path in sorted(RESULTS.rglob("*.json")):
        for command in commands_of(json.loads(path.read_text())):
            found.setdefault(command, path.relative_to(ROOT).as_posix())
    for page in sorted(RESULTS.glob("*.md")):
        for line in re.findall(r"^    (\S.*)$", page.read_text(), re.MULTILINE):
            found.setdefault(line.partition("  #")[0].strip(), page.relative_to(ROOT).as_posix())
        for line in re.findall(r"`(make [a-z][\w-]*|python -m [^`]+)`", page.read_text()):
            found.setdefault(line, page.relative_to(ROOT).as_posix())
    return {command: path for command, path in found.items() if not command.startswith(OPTIONS_OF_SERVERS)}


RECORDED = recorded()


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads the arguments of a command as its program does. Raises where there is no such program, or it refuses them."""
    words = shlex.split(command)
    if words[0] == "make":
        assert set(words[1:]) <= TARGETS, words
        return
    if words[0] == "agentserve":
        given = cli.make_parser().parse_args(words[1:])
        parse_arms(given.arms or (), given.url)
        return
    assert words[0] == "python", words
    original = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        original(self, *given, **named)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    if words[1] == "-m":
        assert find_spec(words[2]) is not None, words[2]
        monkeypatch.setattr(sys, "argv", words[2:])
        with pytest.raises(Parsed):
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    else:
        # A script finds modules in its own folder, not in the root: only a process of its own shows that.
        shell = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, words[1], "--help"], cwd=ROOT, env=shell, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        monkeypatch.setattr(sys, "argv", words[1:])
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize("command", [one for one in RECORDED if one.startswith(("python ", "agentserve ", "make "))])
def test_a_recorded_command_can_be_run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parse(command, monkeypatch)


def test_files_that_recorded_commands_read_are_there() -> None:
    read = [path for command in RECORDED for path in re.findall(r"--(?:cost|recorded) (\S+)", command)]
    assert read
    assert not [path for path in read if not (ROOT / path).exists()]


def test_the_commands_of_results_are_found() -> None:
    named = {path for path in RECORDED.values() if Path(path).suffix == ".json"}
    assert {"docs/results/agreement.json", "docs/results/soak-hour.json", "docs/results/lanes-http.json"} <= named
