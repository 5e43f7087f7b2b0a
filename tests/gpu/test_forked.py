"""Tasks of the GPU check in forked processes: results, failures, time limits, and a fork that cannot use CUDA."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from tests.support.paths import ROOT
from vllm_agentserve.processes.forked import ForkedChild
from vllm_agentserve.processes.task import Task

TASK = "tests.support.forked_task:answering"


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "GIVEN": "yes"}


def child(folder: Path, environment: dict[str, str], options: Any) -> ForkedChild:
    return ForkedChild(Task(TASK, folder / "result.json", 60.0, options, folder / "log", environment))


def test_a_task_answers_from_a_group_and_with_variables_of_its_own(tmp_path: Path, environment: dict[str, str]) -> None:
    forked = child(tmp_path, environment, {"a": 1})
    assert forked.wait(60) == 0
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "options": {"a": 1},
        "group": True,
        "variable": "yes",
    }
    assert "at work" in (tmp_path / "log").read_text()
    assert "GIVEN" not in os.environ


def test_a_task_that_raises_ends_with_its_trace_in_the_log(tmp_path: Path, environment: dict[str, str]) -> None:
    forked = child(tmp_path, environment, ["no mapping"])
    assert forked.wait(60) == 1
    assert "has no attribute 'get'" in (tmp_path / "log").read_text()
    assert not (tmp_path / "result.json").exists()


def test_a_task_that_hangs_can_be_ended_as_a_group(tmp_path: Path, environment: dict[str, str]) -> None:
    forked = child(tmp_path, environment, {"hang": True})
    given_up = monotonic() + 60
    # It leads a group of its own only once it is at work, which takes long on a busy machine.
    while not (tmp_path / "log").exists() or "at work" not in (tmp_path / "log").read_text():
        assert monotonic() < given_up
        assert forked.wait(0.1) is None
    assert forked.wait(0.1) is None
    os.killpg(forked.pid, signal.SIGKILL)
    assert forked.wait(60) == -signal.SIGKILL


def test_where_cuda_was_started_before_the_fork_a_new_interpreter_takes_over(tmp_path: Path) -> None:
    (tmp_path / "started.py").write_text(
        "import sys, types\n"
        "torch = sys.modules['torch'] = types.ModuleType('torch')\n"
        "torch.cuda = sys.modules['torch.cuda'] = types.ModuleType('torch.cuda')\n"
        "torch.cuda._is_in_bad_fork = lambda: True\n"
    )
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            f"""
            import os
            from pathlib import Path
            from vllm_agentserve.processes.forked import ForkedChild, preload
            from vllm_agentserve.processes.task import Task
            if __name__ == "__main__":
                folder = Path({str(tmp_path)!r})
                preload(("started",), os.environ)
                task = Task("{TASK}", folder / "r.json", 60.0, {{"b": 2}}, folder / "log", os.environ)
                child = ForkedChild(task)
                raise SystemExit(child.wait(60))
            """
        )
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], env={**os.environ, "PYTHONPATH": path}, timeout=120, check=False
    )
    assert done.returncode == 0
    assert json.loads((tmp_path / "r.json").read_text())["options"] == {"b": 2}
    assert "a new interpreter takes over" in (tmp_path / "log").read_text()
