"""The GPU check when its time runs out: what was cut short is not called failed, and what it had is kept."""

import tarfile
from pathlib import Path

import pytest

from tests.support.gpu_kit import answer, here
from vllm_agentserve.gpucheck import (
    agents_ab,
    check_run,
    command,
    equality,
    faults,
    host_tokens,
    imports,
    probe,
    throughput,
)
from vllm_agentserve.gpucheck.check_run import CheckRun, PartResult, Status
from vllm_agentserve.gpucheck.schedule import Span
from vllm_agentserve.gpucheck.scripted_requests import beside_requests, to_json
from vllm_agentserve.gpucheck.summary import Done
from vllm_agentserve.processes.task import ChildResult

LATE = ChildResult(None, "x: not done after 9 s\n", 9.0, out_of_time=True)
HUNG = ChildResult(None, "x: not done after 9 s\n", 9.0, hung=True)
DIED = ChildResult(None, "x: exit code 1\n", 1.0)
RECORD = {
    "arm": "stock",
    "round": 0,
    "part": "measured",
    "session": "a",
    "agent": "a",
    "kind": "agent",
    "phase": "cold",
    "turn": 0,
    "prompt": "",
    "prompt_tokens": 9,
    "wanted_tokens": 3,
    "sent_us": 0,
    "ended_us": 3000,
    "stamps_us": [1000, 2000, 3000],
}
RESULT: dict[str, object] = {"records": [RECORD], "seconds": 1.0, "counters": {"lane_requests": 1}, "start_s": 2.0}
RESULT |= {"lane": None, "memory": None}


def test_the_clock_of_the_part_and_the_childs_own_limit_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_run, "STACK_BEFORE_END_S", 0.1)
    where = here(tmp_path)
    hung = where.run("sleeps", "time:sleep", 60, limit_s=1.0)
    assert (hung.out_of_time, hung.hung, hung.status) == (False, True, "failed")
    assert not where.ran_out("sleeps")
    where.end = check_run.time.monotonic() + 1.0
    late = where.run("sleeps", "time:sleep", 60, limit_s=30.0)
    assert (late.out_of_time, late.hung, late.status) == (True, False, "ran out of time")
    assert where.ran_out("sleeps")
    where.end = check_run.time.monotonic()
    never = where.run("other", "math:sqrt", 4)
    assert (never.out_of_time, never.status) == (True, "ran out of time")


@pytest.mark.parametrize(("ended", "status"), [(LATE, "ran out of time"), (HUNG, "failed"), (DIED, "failed")])
def test_parts_pass_on_why_a_child_ended(tmp_path: Path, ended: ChildResult, status: Status) -> None:
    class Cut(CheckRun):
        def _run(self, *args: object, **kwargs: object) -> ChildResult:
            return ended

    where = Cut(tmp_path, "cuda", True, {})
    where.end = check_run.time.monotonic() + 100
    for part in (
        imports.run,
        probe.run,
        equality.run_bfloat16,
        faults.run,
        equality.run_float32,
        host_tokens.run,
        throughput.run,
    ):
        assert part(where).status == status


def test_without_a_gpu_float32_has_no_control(tmp_path: Path) -> None:
    """vLLM's CPU runner fails when a prompt that samples with a seed is cut, so every token has to be stock's there."""
    asked: list[str] = []

    class Answering(CheckRun):
        def _run(self, name: str, *args: object, **kwargs: object) -> ChildResult:
            asked.append(name)
            return ChildResult({"answers": answers, "counters": {"lane_requests": 1}}, None, 1.0)

        def raw(self, name: str) -> object:
            return {"counters": {"lane_requests": 1}}

    jobs = [*equality.requests_of("float32", True), *beside_requests()]
    answers = to_json({job.name: answer([1, 2]) for job in jobs})
    finding = equality.run_float32(Answering(tmp_path, "cpu", True, {}))
    assert (finding.status, len(asked)) == ("ok", 3)
    assert "stock-chunk | not run: vLLM on CPUs" in "\n".join(finding.page)


@pytest.mark.parametrize(
    ("stock", "ended", "status"),
    [
        (True, {"time-sliced": LATE}, "ran out of time"),
        (True, {"time-sliced": HUNG}, "failed"),
        (True, {"time-sliced": DIED}, "failed"),
        (False, {"lanes": HUNG, "stock": LATE}, "ran out of time"),
        (False, {"lanes": HUNG, "stock": HUNG}, "ran out of time"),
        (False, {"lanes": LATE}, "ran out of time"),
        (False, {"lanes": DIED}, "failed"),
    ],
)
def test_an_arm_hangs_only_where_stock_came_to_its_end(
    tmp_path: Path, stock: bool, ended: dict[str, ChildResult], status: Status
) -> None:
    arm = agents_ab.ArmRounds()
    arm.add(0, RESULT)
    arms = {"stock": arm} if stock else {}
    assert agents_ab.finding(here(tmp_path), arms, ended).status == status


def test_an_arm_without_time_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake engine takes 60 of 100 seconds, so the second arm has too little, and its rest goes to later parts."""
    where = here(tmp_path)
    where.small, now = False, [0.0]
    monkeypatch.setattr(CheckRun, "left_s", lambda self: 100.0 - now[0])

    def replay(check: CheckRun, name: str, number: int, limit_s: float) -> ChildResult:
        now[0] += 60.0
        return ChildResult(RESULT, None, 60.0)

    monkeypatch.setattr(agents_ab, "replay", replay)
    finding = agents_ab.run(where)
    assert now[0] == 60.0
    assert finding.status == "ran out of time"
    assert finding.line.startswith(
        "no time for stock, time-sliced; all gaps above twice its own quiet step: lanes 0 of 2"
    )


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ({"imports": "ok", "green": "ok"}, 0),
        ({"imports": "ok", "green": "not run"}, 0),
        ({"imports": "ok", "green": "failed", "agents": "ran out of time"}, 1),
        ({"imports": "failed"}, 3),
        ({"imports": "ok", "agents": "ran out of time"}, 4),
        ({"imports": "ran out of time"}, 4),
    ],
)
def test_exit_codes(found: dict[str, Status], code: int) -> None:
    assert command.exit_code([Done(name, name, PartResult(status, ""), 1.0) for name, status in found.items()]) == code


def test_a_part_without_time_is_not_run_and_told_by_the_exit_code() -> None:
    assert command.exit_code([Done("green", "", PartResult("not run", ""), 0.0, left_out=True)]) == 4


def test_least_times_let_an_engine_start() -> None:
    least = {name: part.span.least_s for name, part in command.PARTS.items()}
    assert (least["equality"], least["agents"], least["faults"]) == (120, 180, 60)
    assert list(least) == [
        "imports",
        "environment",
        "green",
        "equality",
        "agents",
        "faults",
        "equality-float32",
        "host",
        "shares",
    ]


def held(folder: Path) -> dict[str, bytes]:
    """The files of the archive."""
    with tarfile.open(folder / "results.tgz") as archive:
        return {one.name: archive.extractfile(one).read() for one in archive if one.isfile()}  # type: ignore[union-attr]


def test_the_archive_is_written_after_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = here(tmp_path)

    def first(check: CheckRun) -> PartResult:
        check.run("one", "math:sqrt", 16)
        assert "raw/one.json" in held(tmp_path), "a machine that is lost in this part has given it back already"
        return PartResult("ok", "first line")

    def second(check: CheckRun) -> PartResult:
        assert b"first line" in held(tmp_path)["summary.md"]
        raise KeyboardInterrupt

    parts = {
        "a": command.Part("First", first, Span("a", 1, 9)),
        "b": command.Part("Second", second, Span("b", 1, 9)),
        "c": command.Part("Third", first, Span("c", 1, 9)),
    }
    monkeypatch.setattr(command, "PARTS", parts)
    done = command.run_parts(where, list(parts), 60, "command")
    assert [one.finding.status for one in done] == ["ok", "ran out of time"]
    files = held(tmp_path)
    assert {"summary.md", "summary.json", "raw/one.json", "logs/one.log"} == set(files)
    assert b"ended from outside" in files["summary.md"]
    assert not (tmp_path / "results.tgz.part").exists()


def test_the_first_failing_import_is_named_and_ends_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [
        imports.RequiredModule("json", "a"),
        imports.RequiredModule("no_such_module", "install it"),
        imports.RequiredModule("this", "b"),
    ]
    parts = {
        "imports": command.Part(
            "Imports", lambda where: imports.run(where, steps), Span("imports", 1, 30), needed=True
        ),
        "next": command.Part("Next", lambda where: PartResult("ok", ""), Span("next", 1, 9)),
    }
    monkeypatch.setattr(command, "PARTS", parts)
    done = command.run_parts(here(tmp_path), list(parts), 60, "command")
    (one,) = done
    assert one.finding.status == "failed"
    assert "import no_such_module: ModuleNotFoundError" in one.finding.line
    assert one.finding.line.endswith("; install it")
    assert command.exit_code(done) == 3


def test_a_library_that_ends_the_process_is_named(tmp_path: Path) -> None:
    (tmp_path / "ends_here.py").write_text("import os\nos._exit(9)\n")
    where = here(tmp_path)
    where.environment["PYTHONPATH"] = f"{tmp_path}:{where.environment.get('PYTHONPATH', '')}"
    finding = imports.run(where, [imports.RequiredModule("ends_here", "")])
    assert finding.status == "failed"
    assert "importing ends_here" in "\n".join(finding.page)
