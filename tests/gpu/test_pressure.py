"""The part of the GPU check with agents under memory pressure: its order, its time, its figures, and two engines for real."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import pytest

from tests.support import bench_records
from tests.support.gpu_kit import here, needs_cpu_build
from vllm_agentserve.bench.records import Record
from vllm_agentserve.bench.sessions import live_context, longest_context
from vllm_agentserve.gpucheck import command, pressure
from vllm_agentserve.gpucheck.check_run import CheckRun
from vllm_agentserve.gpucheck.engines import engine_arguments, make_engine, variables
from vllm_agentserve.gpucheck.pressure import (
    ARMS,
    HOST,
    LOAD_CONTROL,
    Comparison,
    Pressure,
    needed_gib,
    setting,
    shape_for,
)
from vllm_agentserve.gpucheck.pressure_cells import LARGE, TINY, pool_for, seed_of, sessions_of
from vllm_agentserve.gpucheck.pressure_engine import read_packed, write_packed
from vllm_agentserve.gpucheck.pressure_figures import CellRounds, cell_text, figures_of, hit_percent, table
from vllm_agentserve.gpucheck.standing_task import StandingTask, StandingTaskError
from vllm_agentserve.shapes import SHAPES, TOY, weight_bytes
from vllm_agentserve.vllm_compat import host

NAMES = [arm.name for arm in ARMS]
POOL = pool_for(LARGE, gpu=True)

# Traffic and sizes


def test_contexts_are_so_many_times_the_cache() -> None:
    for cell in LARGE:
        sessions = sessions_of(cell, 1)
        assert live_context(sessions) / POOL.tokens == pytest.approx(cell.times, rel=0.05)
        assert longest_context(sessions) < 13_000 < pressure.LARGE_TOKENS <= POOL.room
        assert {session.start_s for session in sessions} == {0.0}
        assert cell.live == 8
        assert cell.agents <= max(pressure.GRAPH_SIZES)
    (tiny,) = TINY
    pool = pool_for(TINY, gpu=False)
    assert longest_context(sessions_of(tiny, 1)) < pressure.TINY_TOKENS <= pool.room


def test_every_cell_and_round_has_tokens_of_its_own() -> None:
    seeds = [seed_of(LARGE, cell, number) for cell in LARGE for number in range(-1, pressure.ROUNDS)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("free", "model"),
    [
        (None, "toy"),
        (139.3, "qwen2.5-7b"),
        (100.0, "qwen2.5-7b"),
        (78.6, "qwen2.5-3b"),
        (44.0, "qwen2.5-1.5b"),
        (9.0, None),
    ],
)
def test_the_model_is_one_of_which_all_engines_fit(free: float | None, model: str | None) -> None:
    shape = shape_for(free, POOL, len(ARMS))
    assert (shape and shape.name) == model
    assert free is None or shape is None or needed_gib(shape, POOL, 4) <= free


def test_weights_have_the_sizes_of_the_published_models() -> None:
    assert [round(weight_bytes(shape) / 2e9, 1) for shape in SHAPES] == [7.6, 3.1, 1.5, 0.5]


def test_engines_have_the_same_cache_and_measure_no_memory(tmp_path: Path) -> None:
    check = CheckRun(tmp_path, "cuda", False, {})
    given = [engine_arguments(setting(check, arm, SHAPES[0], POOL)) for arm in ARMS]
    for one in given:
        assert one["num_gpu_blocks_override"] == POOL.blocks
        assert one["kv_cache_memory_bytes"] == POOL.tokens * 57_344
        assert one["gpu_memory_utilization"] == pressure.UTILIZATION
        assert one["compilation_config"]["cudagraph_capture_sizes"][-1] == 32
    assert [one.get("additional_config", {}).get("agentserve") for one in given] == [
        None,
        {"mode": "time-sliced"},
        None,
        {"mode": "time-sliced", "load_control": False},
    ]
    folders = [setting(check, arm, SHAPES[0], POOL).folder for arm in ARMS]
    assert len(set(folders)) == len(ARMS), "engines that start at the same time each write a configuration"


def test_engines_compile_their_model_where_that_is_asked_for(tmp_path: Path) -> None:
    """As a server does: vLLM's own modes, so that chunks are CUDA graphs too. Every engine has its own compiled code."""
    check = CheckRun(tmp_path, "cuda", False, {}, compiled=True)
    for arm in ARMS:
        given = engine_arguments(setting(check, arm, SHAPES[0], POOL))
        assert given["compilation_config"] == {"max_cudagraph_capture_size": 512}
        assert "enforce_eager" not in given
    folders = {variables(setting(check, arm, SHAPES[0], POOL))["VLLM_CACHE_ROOT"] for arm in ARMS}
    assert len(folders) == len(ARMS)
    assert all(folder.startswith(str(tmp_path)) for folder in folders)
    plain = CheckRun(tmp_path, "cuda", False, {})
    assert not variables(setting(plain, ARMS[0], SHAPES[0], POOL))


def test_engines_with_host_memory_have_it_alike(tmp_path: Path) -> None:
    """Ours asks for it by our option, stock vLLM by its own."""
    check = CheckRun(tmp_path, "cuda", False, {})
    given = {arm.name: engine_arguments(setting(check, arm, SHAPES[0], POOL)) for arm in HOST.arms}
    size = pressure.host_gib(HOST.arms[1], SHAPES[0], POOL)
    assert size * 2**30 == pytest.approx(5 * POOL.tokens * 57_344, rel=1e-3)
    assert given["agentserve-host"]["additional_config"]["agentserve"] == {
        "mode": "time-sliced",
        "kv_host_gib": size,
        "kv_host_policy": "program",
    }
    asked = given["stock-offload"]["kv_transfer_config"]
    assert asked["kv_connector_extra_config"] == {
        "cpu_bytes_to_use": int(size * 2**30),
        "eviction_policy": "lru",
        "offload_prompt_only": False,
    }
    assert "additional_config" not in given["stock-offload"]
    assert all("kv_transfer_config" not in given[name] for name in ("stock", "agentserve", "agentserve-host"))
    assert max(cell.times for cell in HOST.cells) < pressure.LARGE_HOST, "all contexts fit"


@pytest.mark.parametrize(
    ("free_gib", "shared_gib", "words"),
    [
        (100, 100, None),
        (40, 100, "47.774 GiB are needed, and 40.0 GiB of memory are available"),
        (100, 1, "which has 1.0 GiB left"),
    ],
)
def test_engines_whose_host_memory_has_no_room_do_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gib: int, shared_gib: int, words: str | None
) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: free_gib << 30)
    monkeypatch.setattr(host.os, "statvfs", lambda path: SimpleNamespace(f_bavail=shared_gib, f_frsize=1 << 30))
    found = pressure.host_obstacle(HOST, SHAPES[0], POOL, shared=True)
    assert (found is None) if words is None else (words in (found or ""))
    assert pressure.host_obstacle(LOAD_CONTROL, SHAPES[0], POOL, shared=True) is None
    if words is not None:
        monkeypatch.setattr(pressure, "free_gib", lambda check: 139.0)
        ended = pressure.run_host(CheckRun(tmp_path, "cuda", False, {}))
        assert ended.status == "not run"
        assert words in ended.line


# Figures


def request(session: str, turn: int, prompt: int, cached: int, *stamps_us: int) -> Record:
    return bench_records.record(
        session,
        turn,
        arm="",
        prompt="",
        prompt_tokens=prompt,
        wanted_tokens=len(stamps_us),
        cached_tokens=cached,
        ended_us=stamps_us[-1],
        stamps_us=list(stamps_us),
    )


def records(factor: int = 1, cached: int = 0) -> list[Record]:
    """One session of two turns, which takes 4 s times the factor."""
    second = 1_000_000 * factor
    return [request("a", 0, 98, 0, second, 2 * second), request("a", 1, 150, cached, 3 * second, 4 * second)]


def test_what_resumed_turns_find_is_a_share_of_the_context_before() -> None:
    assert hit_percent(records(cached=25)) == 25.0
    assert hit_percent(records()[:1]) != hit_percent(records()[:1]), "nothing was resumed"


def test_figures_of_one_arm() -> None:
    found = figures_of(records(cached=50), 4.0)
    assert found["session_mean_s"] == found["session_p95_s"] == found["makespan_s"] == 4.0
    assert (found["tokens_per_s"], found["hit_percent"], found["gap_p99_ms"]) == (1.0, 50.0, 1000.0)
    assert (found["ttft_cold_ms"], found["ttft_resume_ms"]) == (1000.0, 3000.0)


def test_arms_are_ratios_to_stock_in_the_same_round() -> None:
    cell = CellRounds()
    for number, (stock, ours) in enumerate([(4, 2), (2, 2)]):
        cell.figures[number] = {
            "stock": figures_of(records(stock), 4.0 * stock),
            "agentserve": figures_of(records(ours, cached=50), 4.0 * ours),
        }
        cell.counters[number] = {"stock": {}, "agentserve": {"load_held_requests": 3 + number}}
    assert cell_text(cell, "stock", "session_mean_s") == "12 [8, 16]"
    assert cell_text(cell, "agentserve", "session_mean_s") == "x0.75 [x0.50, x1.00]"
    assert cell_text(cell, "agentserve", "hit_percent") == "50 [50, 50]"
    text = "\n".join(table(cell))
    assert "| first calls that load control held | - | 3.5 [3, 4] |" in text
    assert "| rounds | 2 | 2 |" in text


# Order and time


class FakeTask:
    """Answers at once; a question takes as long as the clock is told it does."""

    made: ClassVar[list["FakeTask"]] = []
    asked: ClassVar[list[tuple[str, str, int]]] = []
    closed: ClassVar[list[str]] = []
    dies: ClassVar[dict[str, list[tuple[str, int]]]] = {}
    fails_to_start: ClassVar[list[str]] = []
    takes_s = 0.0

    def __init__(self, check: Any, name: str, function: str, options: Any, limit_s: float, fresh: bool = False) -> None:
        self.check, self.name, self.fresh = check, name.removeprefix("pressure-").removeprefix("host-"), fresh
        self.made.append(self)

    def ready(self, limit_s: float) -> Any:
        if self.name in self.fails_to_start:
            self.fails_to_start.remove(self.name)
            raise StandingTaskError(f"{self.name}: exit code 1\nno memory", ended=True)
        return {"start_s": 1.0, "blocks": POOL.blocks}

    def crashed_after_fork(self) -> bool:
        return False

    def ask(self, question: dict[str, Any], limit_s: float) -> Any:
        name, number = f"x{question['cell']['times']}-{question['cell']['gap_s']:g}", question["round"]
        self.asked.append((self.name, name, number))
        self.check.clock += self.takes_s
        if (name, number) in self.dies.get(self.name, []):
            raise StandingTaskError(f"{self.name}: exit code 9\n", ended=True)
        if self.check.left_s() < 0:
            raise StandingTaskError(f"{self.name}: no answer after {limit_s:.0f} s\n", out_of_time=True)
        assert question["live"] == (8 if self.name == "stock-limited" and number >= 0 else None)
        if question["raw"] is not None:
            own = msgspec.to_builtins(records(2 if self.name == "stock" else 1))
            write_packed(Path(question["raw"]), {"records": own, "seconds": 4.0, "counters": {}})
        return {"seconds": 4.0, "load_held_requests": None, "load_hold_seconds": None}

    def hang_up(self) -> None:
        pass

    def close(self) -> None:
        self.closed.append(self.name)


class Clock(CheckRun):
    """A check whose time goes by as its questions are asked."""

    clock = 0.0

    def left_s(self) -> float:
        return self.end - self.clock


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeTask]:
    for name, value in {
        "made": [],
        "asked": [],
        "closed": [],
        "dies": {},
        "fails_to_start": [],
        "takes_s": 10.0,
    }.items():
        monkeypatch.setattr(FakeTask, name, value)
    monkeypatch.setattr(pressure, "StandingTask", FakeTask)
    return FakeTask


def part(
    folder: Path, monkeypatch: pytest.MonkeyPatch, budget_s: float, comparison: Comparison = LOAD_CONTROL
) -> Pressure:
    check = Clock(folder, "cuda", False, {})
    check.end = budget_s
    monkeypatch.setattr(pressure, "time", SimpleNamespace(monotonic=lambda: check.clock))
    return Pressure(check, SHAPES[0], POOL, comparison)


def test_arms_take_turns_in_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeTask]) -> None:
    one = part(tmp_path, monkeypatch, 1e6)
    one.run()
    cells = ["x2-0.2", "x2-1", "x4-0.2", "x2-5"]
    expected = [(cell, number) for cell in cells for number in range(-1, 3)]
    assert [fake.asked[at][1:] for at in range(0, len(fake.asked), 4)] == expected
    rounds = [[name for name, *_ in fake.asked[at : at + 4]] for at in range(0, len(fake.asked), 4)]
    assert all(sorted(names) == sorted(NAMES) for names in rounds)
    assert rounds[0] == NAMES, "the warm-up"
    assert len({tuple(names) for names in rounds[1:4]}) == len({names[0] for names in rounds[1:4]}) == 3
    assert sorted(fake.closed) == sorted(NAMES)
    found = one.finding()
    assert found.status == "ok"
    assert "x2-gap-0.2s: agentserve x0.50 [x0.50, x0.50], stock-limited x0.50" in found.line
    assert len(list((tmp_path / "raw").glob("*.json.gz"))) == 48
    assert "**32 agents of 6 turns, tools of 0.2 s, contexts of 4 KV caches" in "\n".join(found.page)
    assert (tmp_path / "raw" / "pressure.md").read_text().splitlines() == found.page
    json.dumps(found.figures)


def test_each_part_has_its_own_arms_cells_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeTask]
) -> None:
    one = part(tmp_path, monkeypatch, 1e6, HOST)
    one.run()
    names = [arm.name for arm in HOST.arms]
    assert [fake.asked[at][1:] for at in range(0, len(fake.asked), 4)] == [
        (cell, number) for cell in ("x2-1", "x4-1", "x4-0.2", "x2-5") for number in range(-1, 2)
    ]
    assert sorted({name for name, *_ in fake.asked}) == sorted(names)
    text = "\n".join(one.finding().page)
    assert "`stock-offload` has 23.887 GiB of host memory, 5 KV caches (`lru`)." in text
    assert "stock-limited" not in text
    assert len(list((tmp_path / "raw").glob("pressure-host-x*.json.gz"))) == 32
    assert (tmp_path / "raw" / "pressure-host.md").exists()


def test_a_round_is_begun_only_if_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeTask]
) -> None:
    """Warm-up and three rounds take 40 s each; then 40 s are left, which is less than the next cell needs."""
    one = part(tmp_path, monkeypatch, 200.0)
    one.run()
    assert len(fake.asked) == 16
    found = one.finding()
    assert found.status == "ok"
    assert found.line.endswith("no time for x2-gap-1s, x4-gap-0.2s, x2-gap-5s")
    assert one.expected_s(LARGE[0]) == 40.0
    assert one.expected_s(LARGE[2]) == 80.0
    assert one.expected_s(LARGE[3]) > 100.0


def test_a_round_that_the_time_cuts_off_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeTask]
) -> None:
    one = part(tmp_path, monkeypatch, 65.0)
    one.run()
    assert one.measured.cells == {}
    found = one.finding()
    assert (found.status, found.line) == ("ran out of time", "no round came to its end")
    assert list(one.measured.lost) == ["agentserve-no-load-control"], "the fourth arm was not asked any more"
    again = part(tmp_path, monkeypatch, 118.0)
    monkeypatch.setattr(pressure, "ENOUGH", 0.9)
    again.run()
    assert again.measured.cells["x2-gap-0.2s"].rounds_of("stock") == [0]


def test_an_engine_that_ends_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeTask]
) -> None:
    fake.dies = {"agentserve": [("x2-0.2", 1)]}
    one = part(tmp_path, monkeypatch, 300.0)
    one.run()
    cell = one.measured.cells["x2-gap-0.2s"]
    assert (cell.rounds_of("agentserve"), cell.rounds_of("stock")) == ([0], [0, 1, 2])
    found = one.finding()
    assert found.status == "failed"
    assert found.line.startswith("agentserve did not finish; session, mean, of stock's: x2-gap-0.2s: ")
    assert "agentserve: exit code 9" in "\n".join(found.page)


def test_an_engine_that_ends_while_the_others_start_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeTask]
) -> None:
    fake.fails_to_start = ["stock-limited", "agentserve", "agentserve"]
    one = part(tmp_path, monkeypatch, 100.0)
    one.run()
    assert [(task.name, task.fresh) for task in fake.made[4:]] == [("agentserve", True), ("stock-limited", True)]
    assert list(one.measured.lost) == ["agentserve"]
    assert [name for name, *_ in fake.asked[:3]] == ["stock", "stock-limited", "agentserve-no-load-control"]


def test_the_part_runs_only_if_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run_parts(check: CheckRun, names: list[str], *_: object) -> list[Any]:
        ran[:] = names
        return []

    monkeypatch.setattr(command, "run_parts", run_parts)
    monkeypatch.setattr(command, "has_nvidia_driver", lambda: False)
    given = ["--output", str(tmp_path), "--device", "cpu"]
    assert command.main(given) == 0
    assert ran == list(command.PARTS)
    assert command.main([*given, "--parts", "pressure"]) == 0
    assert ran == ["imports", "environment", "pressure"]
    assert command.main([*given, "--parts", "pressure-host"]) == 0
    assert ran == ["imports", "environment", "pressure-host"]


# Processes


def standing(folder: Path, **more: Any) -> StandingTask:
    options = {"name": "one", **more}
    return StandingTask(here(folder), "one", "tests.support.standing:echo", options, 60, fresh=True)


def test_a_task_that_stays_answers_until_it_is_closed(tmp_path: Path) -> None:
    task = standing(tmp_path)
    assert task.ready(60) == {"ready": "one"}
    assert [task.ask({"text": text}, 20) for text in ("a", "b" * 200_000)] == ["aa", "b" * 400_000]
    task.close()
    assert json.loads((tmp_path / "raw" / "one.json").read_text()) == "over"


@pytest.mark.parametrize(
    ("text", "limit_s", "words", "ended"),
    [("die", 20.0, "one: exit code 3\nlast words", True), ("hang", 1.0, "one: no answer after 1 s", False)],
)
def test_a_task_that_ends_or_hangs_is_noticed(
    tmp_path: Path, text: str, limit_s: float, words: str, ended: bool
) -> None:
    task = standing(tmp_path)
    task.ready(60)
    with pytest.raises(StandingTaskError, match=words) as caught:
        task.ask({"text": text}, limit_s)
    assert (caught.value.ended, caught.value.out_of_time) == (ended, False)
    task.close()
    assert task._child.wait(5.0) is not None


def test_a_task_that_never_gets_ready_says_why(tmp_path: Path) -> None:
    task = standing(tmp_path, dies=True)
    with pytest.raises(StandingTaskError, match="no engine today") as caught:
        task.ready(60)
    assert caught.value.ended
    task.close()


@needs_cpu_build
@pytest.mark.engine
def test_two_engines_serve_agents_in_turns(tmp_path: Path, toy_model: Path) -> None:
    given = ["--output", str(tmp_path), "--device", "cpu", "--small", "--parts", "pressure"]
    assert command.main(given) == 0
    found = json.loads((tmp_path / "summary.json").read_text())["parts"]["pressure"]["figures"]
    assert found["model"] == TOY.name
    pool = pool_for(TINY, gpu=False)
    assert {one["blocks"] for one in found["engines"].values()} == {pool.blocks}
    (tiny,) = TINY
    (one,) = found["cells"].values()
    figures = one["figures"]["0"]
    assert list(figures) == ["stock", "agentserve"]
    assert all(value > 0 for arm in figures.values() for key, value in arm.items() if key != "hit_percent")
    assert all(0 <= arm["hit_percent"] <= 100 for arm in figures.values()), "stock may find nothing at all"
    assert {"load_held_requests", "load_hold_seconds"} <= one["counters"]["0"]["agentserve"].keys()
    prompts = []
    for name in figures:
        raw = read_packed(tmp_path / "raw" / f"pressure-{tiny.name}-0-{name}.json.gz")
        assert len(raw["records"]) == tiny.agents * tiny.turns
        assert all(len(record["stamps_us"]) == record["wanted_tokens"] for record in raw["records"])
        prompts.append({record["prompt"] for record in raw["records"] if record["turn"] == 0})
    assert prompts[0] == prompts[1], "both have the same sessions"


def test_the_process_of_an_engine_has_its_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", "of the user")
    seen: list[str] = []
    monkeypatch.setattr("vllm.LLM", lambda model, **given: seen.append(os.environ["VLLM_CACHE_ROOT"]))
    for compiled in (False, True):
        check = CheckRun(tmp_path, "cuda", False, {}, compiled)
        make_engine(setting(check, ARMS[0], SHAPES[0], POOL))
    assert seen == ["of the user", str(tmp_path / "model-stock" / "compiled")]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_page_says_whether_the_model_was_compiled(tmp_path: Path, compiled: bool) -> None:
    one = pressure.Pressure(CheckRun(tmp_path, "cuda", False, {}, compiled), SHAPES[0], POOL)
    assert one.page()[0].endswith(
        "The model is compiled, as in a server." if compiled else "The model is not compiled."
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--device", "cpu", "--parts", "pressure"], "--compiled needs a GPU"),
        (["--device", "cuda"], "name one of them with --parts"),
        (
            ["--device", "cuda", "--parts", "equality", "faults"],
            "--compiled is for the parts pressure and pressure-host",
        ),
    ],
)
def test_compiled_where_nothing_is_compiled_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], words: str
) -> None:
    monkeypatch.setattr(command, "has_nvidia_driver", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--output", str(tmp_path), "--compiled", *given])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("asked", [False, True])
def test_the_command_line_says_whether_models_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    seen: list[CheckRun] = []
    monkeypatch.setattr(command, "run_parts", lambda check, names, budget_s, shown: seen.append(check) or [])
    command.main(
        ["--output", str(tmp_path), "--device", "cuda", "--parts", "pressure", *(["--compiled"] if asked else [])]
    )
    assert [check.compiled for check in seen] == [asked]
