"""The GPU check as far as it runs without a GPU: its judgement as tables, its processes, and one engine for real."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_agentserve.bench.closed_loop import ClosedLoop
from vllm_agentserve.bench.server import has_nvidia_driver, serving_environment
from vllm_agentserve.bench.sessions import Session, Turn
from vllm_agentserve.gpucheck import command, environment, faults, place, probe, shares, summary
from vllm_agentserve.gpucheck.compare import ROUNDING, Comparison, Difference, compare, wrong
from vllm_agentserve.gpucheck.contest import setting as agents_setting
from vllm_agentserve.gpucheck.engines import Setting, engine_arguments, kv_cache_bytes, shape_for
from vllm_agentserve.gpucheck.jobs import Answer, Job, beside_jobs, from_json, mixed_jobs, to_json
from vllm_agentserve.gpucheck.multiprocessors import granted
from vllm_agentserve.gpucheck.place import Finding, Place, child_environment
from vllm_agentserve.gpucheck.schedule import Span, allowance
from vllm_agentserve.gpucheck.summary import Done

needs_cpu_build = pytest.mark.skipif(has_nvidia_driver(), reason="vLLM takes the GPU where there is one")


def here(folder: Path) -> Place:
    return Place(folder, "cpu", True, child_environment(os.environ, serving_environment(base={})))


# Time


@pytest.mark.parametrize(
    ("left_s", "later", "allowed"),
    [
        (100.0, [], 60.0),
        (100.0, [50.0], 50.0),
        (100.0, [50.0, 30.0], 20.0),
        (100.0, [50.0, 45.0], 50.0),
        (10.0, [50.0], 10.0),
        (9.9, [], None),
        (-1.0, [], None),
    ],
)
def test_a_part_leaves_time_to_those_after_it(left_s: float, later: list[float], allowed: float | None) -> None:
    assert allowance(Span("part", 10, 60), [Span("later", least, 99) for least in later], left_s) == allowed


def test_the_default_budget_has_room_for_every_part() -> None:
    assert sum(part.span.least_s for part in command.PARTS.values()) < command.BUDGET_S < 480


# Judgement


def answer(tokens: Sequence[int], apart: float = 0.0, other: int = 99, margin: float = 1.0) -> Answer:
    """An answer whose tokens all have log-probability -1 + `apart`, and whose second choice is `other`."""
    return Answer(list(tokens), [{token: -1.0 + apart, other: -1.0 - margin} for token in tokens])


def job(name: str = "a", abort_after: int | None = None) -> Job:
    return Job(name, 0, (1,), 4, abort_after=abort_after)


@pytest.mark.parametrize(
    ("reference", "other", "abort_after", "equal", "position", "margin"),
    [
        ([1, 2, 3], [1, 2, 3], None, 1, None, None),
        ([1, 2, 3], [1, 99, 3], None, 0, 1, 1.0),
        ([1, 2, 3], [1, 98, 3], None, 0, 1, None),
        ([1, 2, 3], [1, 2], None, 0, 2, None),
        ([1, 2], [1, 2, 3], None, 0, 2, None),
        ([1, 2, 3], [1, 2], 2, 1, None, None),
        ([1, 2, 3], [1, 99], 2, 0, 1, 1.0),
        ([1, 2, 3], [], 2, 0, 0, None),
    ],
)
def test_answers_are_compared_up_to_the_first_difference(
    reference: list[int],
    other: list[int],
    abort_after: int | None,
    equal: int,
    position: int | None,
    margin: float | None,
) -> None:
    found = compare({"a": answer(reference)}, {"a": answer(other)}, [job(abort_after=abort_after)])
    assert (found.compared, found.equal) == (1, equal)
    assert [one.position for one in found.differences] == ([] if position is None else [position])
    assert [one.margin for one in found.differences] == ([] if position is None else [margin])


def test_a_request_nobody_answered_is_a_difference() -> None:
    assert compare({"a": answer([1, 2])}, {}, [job()]).differences == [Difference("a", 0, None)]


def test_a_reference_without_the_request_is_an_error() -> None:
    with pytest.raises(ValueError, match="no answer to a"):
        compare({}, {}, [job()])


def test_noise_is_that_of_equal_contexts() -> None:
    """Behind the first difference the contexts differ, and with them everything."""
    other = Answer([1, 99, 7], [{1: -1.25}, {99: -0.1, 2: -1.5}, {7: -9.0}])
    assert compare({"a": answer([1, 2, 7])}, {"a": other}, [job()]).noise == 0.5


EQUAL = Comparison(2, 2, 1e-6)
TIED = Comparison(2, 1, 0.05, [Difference("a", 3, 0.02)])


@pytest.mark.parametrize(
    ("comparison", "control", "words"),
    [
        (EQUAL, None, None),
        (EQUAL, EQUAL, None),
        (EQUAL, TIED, None),
        (TIED, TIED, None),
        (TIED, None, "1 of 2 requests have other tokens"),
        (TIED, EQUAL, "1 of 2 requests have other tokens"),
        (Comparison(2, 1, 0.05, [Difference("a", 3, 0.101)]), TIED, "a differs at token 3, and not by a tie"),
        (Comparison(2, 1, 0.05, [Difference("a", 3, None)]), TIED, "a differs at token 3, and not by a tie"),
        (Comparison(2, 1, 0.0, [Difference("a", 3, 2 * ROUNDING)]), Comparison(2, 1, 0.0, []), None),
        (Comparison(2, 2, 1e-3), EQUAL, "log-probabilities differ by up to 0.001, rounding allows 0.0002"),
        (Comparison(2, 2, 1e-3), Comparison(2, 2, 5e-4), None),
        (Comparison(2, 2, 0.3), TIED, "log-probabilities differ by up to 0.3"),
    ],
)
def test_an_arm_may_differ_only_where_stock_differs_from_itself(
    comparison: Comparison, control: Comparison | None, words: str | None
) -> None:
    why = wrong(comparison, control)
    assert (why is None) == (words is None)
    assert words is None or words in str(why)


def test_answers_survive_json() -> None:
    answers = {"a": answer([1, 2], 0.5)}
    assert from_json(json.loads(json.dumps(to_json(answers)))) == answers


def test_the_mix_has_everything() -> None:
    jobs = mixed_jobs(20, seeded=True)
    assert {job.seed is None for job in jobs} == {True, False}
    assert {job.abort_after is None for job in jobs} == {True, False}
    assert sum(jobs[0].prompt[:200] == other.prompt[:200] for other in jobs) < len(jobs)
    assert len({job.prompt[:200] for job in jobs if len(job.prompt) > 900}) < sum(len(job.prompt) > 900 for job in jobs)
    assert all(job.seed is None for job in mixed_jobs(20, seeded=False))


def probed(**changes: Any) -> dict[str, Any]:
    seen = {"decode": [0, 1], "prefill": [2, 3, 4], "graph": [0, 1]}
    arms = [{"arm": "alone", "p50_ms": 0.2, "p99_ms": 0.25, "max_ms": 0.3}]
    found = {"driver": 13000, "units": 5, "splits": [{"asked": 2, "got": 2, "rest": 3}, {"asked": 9, "error": "NO"}]}
    return found | {"slots": [{"decode": 2, "prefill": 3}], "seen": [seen | changes], "seen_primary": [0], "arms": arms}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"decode": [0], "graph": [0]}, None),
        ({"decode": [0, 2]}, "both lanes ran on 1 multiprocessors"),
        ({"prefill": [2, 3, 4, 5]}, "lanes ran on 2+4 multiprocessors"),
        ({"graph": [0, 1, 2]}, "a graph captured on the decode lane ran on 1 others"),
    ],
)
def test_work_on_the_other_lane_is_noticed(changes: dict[str, Any], words: str | None) -> None:
    problems = probe.trespasses(probed(**changes))
    assert bool(problems) == (words is not None)
    assert words is None or words in problems[0]


def test_the_probe_has_a_page() -> None:
    text = "\n".join(probe.page_of(probed()))
    for words in (
        "driver for CUDA 13.0",
        "| 2 | 2 | 3 |",
        "| 9 | NO |",
        "| 2+3 | 2 | 3 | 0 | 2 |",
        "| alone | 0.200 |",
    ):
        assert words in text
    assert "Triton is not installed" in "\n".join(probe.page_of(probed() | {"seen": None}))


class SplitDriver:
    """As much of `cuda.bindings.driver` as a split of ten multiprocessors needs."""

    class CUdevResourceType:
        CU_DEV_RESOURCE_TYPE_SM = 1

    def cuDeviceGet(self, ordinal: int) -> tuple[int, int]:
        return 0, ordinal

    def cuDeviceGetDevResource(self, device: int, kind: int) -> tuple[int, SimpleNamespace]:
        return 0, self.resource(10)

    def cuDevSmResourceSplitByCount(
        self, groups: int, whole: SimpleNamespace, flags: int, least: int
    ) -> tuple[Any, ...]:
        if least > whole.sm.smCount:
            return 914, None, None, None
        got = -(-least // 4) * 4
        return 0, [self.resource(got)], 1, self.resource(whole.sm.smCount - got)

    def cuGetErrorName(self, error: int) -> tuple[int, bytes]:
        return 0, b"CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION"

    def resource(self, units: int) -> SimpleNamespace:
        return SimpleNamespace(sm=SimpleNamespace(smCount=units))


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (3, {"asked": 3, "got": 4, "rest": 6}),
        (8, {"asked": 8, "got": 8, "rest": 2}),
        (11, {"asked": 11, "error": "CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION"}),
    ],
)
def test_splits_are_reported_as_granted(asked: int, found: dict[str, Any]) -> None:
    assert granted(SplitDriver(), asked) == found


def test_the_kernel_of_the_probe_compiles_for_a_gpu() -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_agentserve.gpucheck.kernels import stay

    source = ASTSource(fn=stay, signature={"seen": "*i32", "nanoseconds": "i32"})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "%smid" in ptx
    assert "%globaltimer" in ptx


def scenario(tokens: list[int], **gained: int) -> dict[str, Any]:
    """Every request of `beside_jobs` answered with the same tokens."""
    return {"answers": to_json({job.name: answer(tokens) for job in beside_jobs()}), "gained": gained}


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({}, []),
        ({"raise": scenario([1, 7], lane_failed_requests=1)}, ["raise: 4 of 4 have other tokens"]),
        ({"raise": scenario([1, 2])}, ["no chunk raised in the lane"]),
        ({"plain": scenario([1, 2])}, ["no prompt went to the lane"]),
    ],
)
def test_faults_are_judged(changes: dict[str, Any], problems: list[str]) -> None:
    good = scenario([1, 2], lane_requests=2, lane_failed_requests=1)
    found = {
        "scenarios": {name: good for name in ("plain", "abort", "raise")} | changes,
        "aborted": ["cold-0"],
        "spoilt": 1,
    }
    assert faults.judge(from_json(good["answers"]), found) == problems


def test_an_aborted_request_may_have_no_answer() -> None:
    good = scenario([1, 2], lane_requests=2, lane_failed_requests=1)
    short = {"answers": {name: one for name, one in good["answers"].items() if name != "cold-0"}, "gained": {}}
    found = {"scenarios": {"plain": good, "abort": short, "raise": good}, "aborted": ["cold-0"], "spoilt": 1}
    assert faults.judge(from_json(good["answers"]), found) == []
    assert faults.judge(from_json(good["answers"]), found | {"aborted": []}) != []


@dataclass(frozen=True)
class LaneJob:
    request_id: str
    token_ids: list[Any] = field(default_factory=list)


def test_one_long_job_is_spoilt_on_its_way_to_the_lane() -> None:
    spy = faults.LaneSpy("cpu", spoil=1)
    short, long = LaneJob("short-1", [1] * 50), LaneJob("long-1", [1] * 1100)
    assert spy.passed(short) is short
    spoilt = spy.passed(long)
    assert len(spoilt.token_ids) == 1100
    assert spoilt.token_ids[0] == "not a number"
    assert spy.passed(long) is long
    assert spy.has_seen("long")
    assert not spy.has_seen("other")


# What runs


@pytest.mark.parametrize(
    ("free", "model", "cache"),
    [
        (None, "toy", 2.0),
        (139.0, "qwen2.5-7b", 8.0),
        (22.5, "qwen2.5-3b", 4.5),
        (11.0, "qwen2.5-1.5b", 2.2),
        (4.0, "qwen2.5-0.5b", 1.0),
    ],
)
def test_the_model_fits_the_memory(free: float | None, model: str, cache: float) -> None:
    assert shape_for(free).name == model
    assert kv_cache_bytes(free) / 2**30 == pytest.approx(cache)


@pytest.mark.parametrize(
    ("arm", "device", "dtype", "graphs", "has", "has_not"),
    [
        (
            "stock",
            "cpu",
            "float32",
            False,
            {"enforce_eager": True, "load_format": "auto"},
            {"scheduler_cls", "attention_config"},
        ),
        ("stock", "cuda", "float32", False, {"attention_config": {"backend": "TRITON_ATTN"}}, {"compilation_config"}),
        ("stock", "cuda", "bfloat16", True, {"attention_config": {"backend": "FLASH_ATTN"}}, {"enforce_eager"}),
        ("stock-chunk", "cpu", "float32", False, {"max_num_batched_tokens": 256}, {"scheduler_cls"}),
        (
            "lanes",
            "cpu",
            "float32",
            False,
            {"additional_config": {"agentserve": {"mode": "lanes", "tpot_slo_ms": 9}}},
            set(),
        ),
    ],
)
def test_engines_get_what_their_arm_needs(
    arm: str, device: str, dtype: str, graphs: bool, has: dict[str, Any], has_not: set[str]
) -> None:
    given = engine_arguments(Setting(arm, "toy", dtype, device, "", graphs, {"tpot_slo_ms": 9}))
    assert has.items() <= given.items()
    assert not has_not & set(given)


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ValueError, match="arm 'fast' is unknown: choose one of stock, "):
        engine_arguments(Setting("fast", "toy", "float32", "cpu", ""))


def test_what_nvidia_smi_says_is_read() -> None:
    line = "NVIDIA H200, 580.65.06, 143771, 143000, 345, 1980, 3201, 700.00, 31, Disabled"
    assert environment.read_smi(line)["sm_clock_max_mhz"] == "1980"
    with pytest.raises(ValueError, match="shorter"):
        environment.read_smi("NVIDIA H200, 580.65.06")


@dataclass
class Output:
    """As much of vLLM's `RequestOutput` as the loop reads."""

    request_id: str
    token_ids: list[int]
    finished: bool
    num_cached_tokens: int = 0

    @property
    def outputs(self) -> list["Output"]:
        return [self]


class OneTokenAStep:
    """An engine that gives every request one token per step."""

    def __init__(self) -> None:
        self.prompts: dict[str, list[int]] = {}
        self.left: dict[str, int] = {}
        self.given: dict[str, list[int]] = {}

    def add_request(self, name: str, prompt: dict[str, list[int]], parameters: Any) -> None:
        self.prompts[name], self.left[name] = prompt["prompt_token_ids"], parameters.max_tokens
        self.given[name] = []

    def step(self) -> list[Output]:
        outputs = []
        for name in list(self.left):
            self.left[name] -= 1
            self.given[name].append(500 + len(self.given[name]))
            outputs.append(Output(name, list(self.given[name]), not self.left[name]))
            if not self.left[name]:
                del self.left[name]
        return outputs


def test_agents_wait_for_their_answers_and_tools() -> None:
    turns = (Turn((1, 2), 3), Turn((7,), 2, tool_s=0.05))
    sessions = [Session("a", "agent", turns), Session("b", "agent", (Turn((5,), 1),), start_s=0.02, after="a")]
    engine = OneTokenAStep()
    loop = ClosedLoop(engine, sessions, "stock", 3)
    records = loop.run()
    assert engine.prompts == {"a/0": [1, 2], "a/1": [1, 2, 500, 501, 502, 7], "b/0": [5]}
    assert [(r.session, r.turn, r.phase, len(r.stamps_us), r.arm, r.round) for r in records] == [
        ("a", 0, "cold", 3, "stock", 3),
        ("a", 1, "resume", 2, "stock", 3),
        ("b", 0, "cold", 1, "stock", 3),
    ]
    assert records[1].sent_us - records[0].ended_us == pytest.approx(50_000, abs=2)
    assert records[2].sent_us - records[1].ended_us == pytest.approx(20_000, abs=2)
    assert all(record.sent_us <= record.stamps_us[0] <= record.ended_us for record in records)


# Processes


def test_a_task_that_raises_leaves_its_last_words(tmp_path: Path) -> None:
    ended = here(tmp_path).run("wrong", "math:sqrt", "text")
    assert ended.result is None
    assert "wrong: exit code 1" in str(ended.error)
    assert "TypeError" in str(ended.error)


def test_a_task_that_hangs_is_ended_and_shows_where_it_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = here(tmp_path)
    monkeypatch.setattr(place, "STACK_BEFORE_END_S", 0.5)
    ended = where.run("hangs", "time:sleep", 600, limit_s=4.0)
    assert 3.0 < ended.seconds < 30.0
    assert "hangs: not done after 4 s" in str(ended.error)
    assert "Thread" in str(ended.error)
    assert where.raw("hangs") is None


def test_a_result_comes_back_and_stays_in_the_folder(tmp_path: Path) -> None:
    where = here(tmp_path)
    assert where.run("fine", "math:sqrt", 16).result == 4.0
    assert where.raw("fine") == 4.0
    assert here(tmp_path).raw("fine") is None, "what an earlier check left is not this one's"


def test_a_part_that_raises_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(where: Place) -> Finding:
        raise RuntimeError("out of luck")

    parts = {
        "a": command.Part("First", broken, Span("a", 1, 9)),
        "b": command.Part("Second", lambda where: Finding("ok", f"{where.left_s():.0f} s"), Span("b", 1, 9)),
        "c": command.Part("Third", broken, Span("c", 90, 99)),
    }
    monkeypatch.setattr(command, "PARTS", parts)
    done = command.check(here(tmp_path), list(parts), 20, "command")
    assert [one.finding.status for one in done] == ["failed", "ok", "not run"]
    assert "RuntimeError: out of luck" in done[0].finding.line
    assert done[1].finding.line == "9 s"
    assert "| Second | **ok** | 9 s |" in (tmp_path / "summary.md").read_text()


def test_the_summary_is_json_that_everybody_reads() -> None:
    done = [Done("a", "A", Finding("ok", "fine", [], {"p99": math.nan, "rows": [(1, math.inf)]}), 1.0)]
    text = json.dumps(summary.figures(done, "command"), allow_nan=False)
    assert json.loads(text)["parts"]["a"]["figures"] == {"p99": None, "rows": [[1, None]]}


def test_shares_are_shown_against_the_largest() -> None:
    points = [{"work": "decode", "units": units, "tokens_per_s": 10.0 * units} for units in (2, 1)]
    assert shares.table(points, "cores")[2:] == ["| 1 | 10 (50%) |", "| 2 | 20 (100%) |"]


@needs_cpu_build
def test_the_command_without_a_gpu(tmp_path: Path) -> None:
    """What needs a GPU is said not to have run; nothing of it is made up."""
    given = ["--output", str(tmp_path), "--device", "cpu", "--small", "--parts", "green", "shares"]
    assert command.main(given) == 0
    found = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert {name: part["status"] for name, part in found.items()} == {
        "environment": "ok",
        "green": "not run",
        "shares": "ok",
    }
    assert found["green"]["line"] == "no CUDA device"
    assert found["environment"]["figures"]["gpu"] is None
    points = found["shares"]["figures"]["points"]
    assert len(points) == 3 * len(os.sched_getaffinity(0))
    assert all(point["tokens_per_s"] > 0 for point in points)
    assert "Shares of multiprocessors: not run: no CUDA device." in (tmp_path / "summary.md").read_text()


@needs_cpu_build
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="lanes need two cores")
def test_agents_on_a_real_engine_with_lanes(tmp_path: Path, toy_model: Path) -> None:
    where = here(tmp_path)
    options = {
        "setting": asdict(agents_setting(where, "lanes")),
        "shape": {"agents": 3, "sessions": 1, "turns": 2, "scale": 0.3},
        "stagger_s": 0.2,
        "seed": 0,
        "round": 0,
    }
    ended = where.run("agents", "vllm_agentserve.gpucheck.agents:replay", options, 240)
    assert ended.error is None
    records = ended.result["records"]
    assert len(records) == 6
    assert all(len(record["stamps_us"]) == record["wanted_tokens"] for record in records)
    assert all(record["cached_tokens"] >= 128 for record in records if record["phase"] == "resume")
    assert ended.result["counters"]["lane_requests"] > 0
    assert ended.result["counters"]["cold_prefill_requests"] >= 3


def test_nothing_beyond_what_a_bare_gpu_machine_has_is_imported() -> None:
    extras = ("aiohttp", "scipy", "jinja2", "matplotlib", "psutil", "rich", "uvloop", "pynvml")
    code = (
        f"import sys\nfor name in {extras}: sys.modules[name] = None\n"
        "import vllm_agentserve.gpucheck.command, vllm_agentserve.gpucheck.agents, vllm_agentserve.gpucheck.stack\n"
        "print('torch' in sys.modules, 'vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"]
