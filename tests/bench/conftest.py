"""The command line for the benchmark's tests."""

import re
import sys
from pathlib import Path

import pytest

from tests.support.garbage import frozen  # noqa: F401  a fixture of all tests here
from vllm_agentserve import cli


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `agentserve ARGUMENTS` in an empty folder; returns exit code and what it printed, on one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["agentserve", *arguments])
        try:
            code = cli.main(list(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, re.sub(r"\s+", " ", said.out + said.err)

    return call
