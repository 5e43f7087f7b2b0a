"""How processes of the GPU check begin and end where something is in the way: a slow fork, a crash, a full disk, a kill."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.gpu_kit import here
from tests.support.paths import ROOT
from vllm_agentserve.gpucheck import check_run, command, summary
from vllm_agentserve.gpucheck.check_run import CheckRun, PartResult
from vllm_agentserve.gpucheck.schedule import Span
from vllm_agentserve.processes import starter
from vllm_agentserve.processes.starter import Child
from vllm_agentserve.processes.task import Task, tail


@pytest.fixture
def forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckRun:
    """A check whose children are forked, without the imports of vLLM, and find modules in its folder."""
    monkeypatch.setattr(starter, "PRELOAD", ("json",))
    monkeypatch.syspath_prepend(tmp_path)
    where = here(tmp_path)
    where.environment["PYTHONPATH"] = f"{tmp_path}:{where.environment.get('PYTHONPATH', '')}"
    where.starter.prepare("cpu", where.environment)
    return where


def test_waiting_for_the_fork_is_no_time_of_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 100 s while the process that forks imports, and some of a second while the task runs."""
    where, waited = here(tmp_path), [0.0]
    monkeypatch.setattr(check_run, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + waited[0]))
    start = where.starter.start

    def slow(task: Task, fresh: bool) -> Child:
        waited[0] += 100.0
        return start(task, fresh)

    monkeypatch.setattr(where.starter, "start", slow)
    ended = where.run("lanes", "math:sqrt", 16, limit_s=60.0)
    assert (ended.result, ended.hung) == (4.0, False)
    assert ended.seconds < 60.0
    where.end = check_run.time.monotonic() + 50.0
    late = where.run("late", "math:sqrt", 16, limit_s=60.0)
    assert (late.out_of_time, late.hung) == (True, False), "the part's own clock goes on"


def test_a_crash_of_a_forked_child_is_named_by_its_part(forks: CheckRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a lane overwrites crashes only now and then: that it came through at the second try does not unsay it."""
    (forks.folder / "crashes_once.py").write_text(
        "import os, signal\n"
        "def run(marker):\n"
        "    if not os.path.exists(marker):\n"
        "        open(marker, 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return 1\n"
    )

    def first(where: CheckRun) -> PartResult:
        ended = where.run("once", "crashes_once:run", str(where.folder / "marker"))
        return PartResult(ended.status, "all is well", figures={"n": ended.result})

    parts = {
        "a": command.Part("First", first, Span("a", 1, 60)),
        "b": command.Part("Second", lambda where: PartResult("ok", "fine"), Span("b", 1, 60)),
    }
    monkeypatch.setattr(command, "PARTS", parts)
    done = command.run_parts(forks, list(parts), 600, "command")
    assert [one.finding.status for one in done] == ["ok", "ok"]
    assert done[0].finding.line == (
        "all is well; once: a forked process ended by signal 11, and its task was run again in a new interpreter "
        "(logs/once-forked.log)"
    )
    assert done[0].finding.figures["n"] == 1
    assert len(done[0].finding.figures["crashes"]) == 1
    assert done[1].finding.line == "fine"
    assert (forks.folder / "logs" / "once-forked.log").exists()


def test_a_fork_that_ends_before_its_task_begins_is_done_without(
    forks: CheckRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = starter.ForkedChild

    def ends_early(task: Task) -> Any:
        return made(replace(task, log=forks.folder / "no such folder" / "log"))

    monkeypatch.setattr(starter, "ForkedChild", ends_early)
    (forks.folder / "logs" / "one.log").write_text("of an earlier check")
    assert forks.run("one", "math:sqrt", 16).result == 4.0
    (crash,) = forks.forget_crashes()
    assert "with exit code 1 before its task began" in crash
    assert tail(forks.folder / "logs" / "none.log") == ""


def test_what_an_earlier_check_left_is_no_result(tmp_path: Path) -> None:
    where = here(tmp_path)
    (tmp_path / "raw" / "one.json").write_text("16")
    ended = where.run("one", "os:_exit", 0)
    assert (ended.result, ended.status) == (None, "failed")
    assert "one: no result" in str(ended.error)
    assert where.raw("one") is None


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("writes", ["archive", "summary"])
def test_a_full_disk_does_not_end_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], writes: str
) -> None:
    where = here(tmp_path)

    def first(_: CheckRun) -> PartResult:
        with monkeypatch.context() as patched:
            patched.setattr(check_run, "write_archive", full)
            assert where.run("one", "math:sqrt", 16).result == 4.0
        holder, name = (command, "write_archive") if writes == "archive" else (summary, "write")
        monkeypatch.setattr(holder, name, full)
        return PartResult("ok", "first line")

    def second(_: CheckRun) -> PartResult:
        monkeypatch.undo()
        return PartResult("ok", "second line")

    parts = {
        "a": command.Part("First", first, Span("a", 1, 9)),
        "b": command.Part("Second", second, Span("b", 1, 9)),
    }
    monkeypatch.setattr(command, "PARTS", parts)
    done = command.run_parts(where, list(parts), 60, "command")
    assert done[0].finding.line == ("first line; its results could not be written: [Errno 28] No space left on device")
    assert command.exit_code(done[:1]) == 1
    assert (done[1].finding.line, done[1].unwritten) == ("second line", False)
    assert "first line; its results" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "results.tgz").exists()
    assert "could not be written" in capfd.readouterr().err


def test_half_an_archive_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_agentserve.gpucheck import archive

    (tmp_path / "summary.md").write_text("text")
    archive.write_archive(tmp_path)
    before = (tmp_path / "results.tgz").read_bytes()
    monkeypatch.setattr(archive.tarfile.TarFile, "add", full)
    with pytest.raises(OSError, match="No space left"):
        archive.write_archive(tmp_path)
    assert not (tmp_path / "results.tgz.part").exists()
    assert (tmp_path / "results.tgz").read_bytes() == before


def is_there(pid: int) -> bool:
    """Whether the process runs; one that has ended and is waited for by nobody does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize("fresh", [True, False])
def test_no_engine_goes_on_when_the_check_is_killed(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "sleeps.py").write_text(
        "import json, os, time\n"
        "def run(file):\n"
        "    with open(file + '.part', 'w') as out: json.dump([os.getpid(), os.getppid()], out)\n"
        "    os.replace(file + '.part', file)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            f"""
            import os
            from pathlib import Path
            from vllm_agentserve.processes import starter
            from vllm_agentserve.gpucheck.check_run import CheckRun
            if __name__ == "__main__":
                starter.PRELOAD = ("json",)
                where = CheckRun(Path({str(tmp_path)!r}), "cpu", True, os.environ)
                where.starter.prepare("cpu", where.environment)
                where.run("sleeps", "sleeps:run", {str(tmp_path / "pids")!r}, 50.0, fresh={fresh})
            """
        )
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    check = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], env={**os.environ, "PYTHONPATH": path})
    pids: list[int] = []
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "pids").exists() and time.monotonic() < end:
            time.sleep(0.05)
        pids = json.loads((tmp_path / "pids").read_text())
        assert (pids[1] == check.pid) is fresh
        check.kill()
        check.wait(20)
        end = time.monotonic() + 20
        while any(is_there(pid) for pid in pids) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(is_there(pid) for pid in pids), "the child and the process it was forked from have ended"
    finally:
        check.kill()
        check.wait(20)
        for pid in pids:
            if is_there(pid):
                os.kill(pid, signal.SIGKILL)
