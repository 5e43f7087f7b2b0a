"""How the GPU check starts its children: forked where that works, and in a new interpreter where it does not."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.gpu_kit import here
from vllm_agentserve.gpucheck.check_run import CheckRun
from vllm_agentserve.processes import starter
from vllm_agentserve.processes.task import ChildError, Task, tail


@pytest.fixture
def forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckRun:
    """A check whose children are forked, without the imports of vLLM."""
    monkeypatch.setattr(starter, "PRELOAD", ("json",))
    where = here(tmp_path)
    where.starter.prepare("cpu", where.environment)
    return where


@pytest.mark.slow
def test_forked_children_answer_fail_and_hang_as_fresh_ones_do(forks: CheckRun) -> None:
    assert forks.run("fine", "math:sqrt", 16).result == 4.0
    wrong = forks.run("wrong", "math:sqrt", "text")
    assert "wrong: exit code 1" in str(wrong.error)
    assert "TypeError" in str(wrong.error)
    hangs = forks.run("hangs", "time:sleep", 600, limit_s=4.0)
    assert (hangs.hung, hangs.out_of_time) == (True, False)
    assert 3.0 < hangs.seconds < 30.0
    assert "Thread" in str(hangs.error)
    assert forks.run("fresh", "math:sqrt", 9, fresh=True).result == 3.0


def test_where_no_fork_can_be_had_a_new_interpreter_does_the_task(
    forks: CheckRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def broken(task: Task) -> None:
        asked.append(task.function)
        raise EOFError

    monkeypatch.setattr(starter, "ForkedChild", broken)
    assert forks.run("one", "math:sqrt", 16).result == 4.0
    assert forks.run("two", "math:sqrt", 9).result == 3.0
    assert asked == ["math:sqrt"], "it is tried once"
    assert "children cannot be forked here" in capfd.readouterr().err


def test_a_fork_that_does_not_come_is_not_waited_for(forks: CheckRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "FORK_S", 0.2)
    monkeypatch.setattr(starter, "ForkedChild", lambda *args: time.sleep(30))
    began = time.monotonic()
    assert forks.run("one", "math:sqrt", 16).result == 4.0
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(("trial", "forked"), [("math:sqrt", True), ("os:_exit", False), ("os:no_such_call", False)])
def test_forks_are_used_on_a_gpu_only_where_a_trial_could_use_cuda(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    trial: str,
    forked: bool,
) -> None:
    monkeypatch.setattr(starter, "PRELOAD", ("json",))
    monkeypatch.setattr(starter, "TRIAL", trial)
    made: list[str] = []
    fork = starter.ForkedChild

    def counted(task: Task) -> Any:
        made.append(task.function)
        return fork(replace(task, options=4) if task.options is None else task)

    monkeypatch.setattr(starter, "ForkedChild", counted)
    where = here(tmp_path)
    where.starter.prepare("cuda", where.environment)
    assert where.run("one", "math:sqrt", 16).result == 4.0
    assert where.run("two", "math:sqrt", 9).result == 3.0
    assert len(made) == (3 if forked else 1)
    assert ("children cannot be forked here" in capfd.readouterr().err) is not forked


def test_a_forked_child_that_a_signal_ends_is_run_again_in_a_new_interpreter(
    forks: CheckRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork can be what crashes a library, so a crash counts only where the child was not forked."""
    (tmp_path / "forked_only.py").write_text(
        "import os, signal, sys\n"
        "def run(options):\n"
        "    if 'multiprocessing.forkserver' in sys.modules:\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return options\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    forks.environment["PYTHONPATH"] = f"{tmp_path}:{forks.environment.get('PYTHONPATH', '')}"
    ended = forks.run("one", "forked_only:run", 5)
    assert ended.result == 5
    assert "Fatal Python error" in (tmp_path / "logs" / "one-forked.log").read_text()
    (tmp_path / "raw" / "one.json").unlink()
    assert forks.run("two", "forked_only:run", 6).result == 6
    assert not (tmp_path / "logs" / "two-forked.log").exists(), "no other child is forked"


def test_of_a_crash_the_first_lines_are_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    frames = [f'  File "<unknown>", line 0, in frame {number}' for number in range(50)]
    log.write_text("\n".join(["loading", "Fatal Python error: Segmentation fault", "", "Current thread", *frames]))
    assert tail(log).splitlines()[:3] == ["Fatal Python error: Segmentation fault", "", "Current thread"]
    assert len(tail(log).splitlines()) == 12


def test_a_function_is_called_in_a_child_and_its_failure_is_raised_with_its_last_lines() -> None:
    assert starter.call("math:sqrt", 16, os.environ) == 4.0
    with pytest.raises(ChildError, match=r"math:sqrt: exit code 1\n(.|\n)*TypeError"):
        starter.call("math:sqrt", "text", os.environ)
    with pytest.raises(ChildError, match=r"time:sleep: not done after 3 s\n(.|\n)*Thread"):
        starter.call("time:sleep", 600, os.environ, limit_s=3.0)
