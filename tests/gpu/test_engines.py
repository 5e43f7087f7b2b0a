"""The GPU check's engines, agents, tasks and command, without a GPU."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.gpu_kit import here, needs_cpu_build
from tests.support.new_python import run_code
from vllm_agentserve.bench.closed_loop import ClosedLoop
from vllm_agentserve.bench.sessions import Session, Turn
from vllm_agentserve.gpucheck import check_run, command, environment, summary, throughput
from vllm_agentserve.gpucheck.agents_ab import setting as agents_setting
from vllm_agentserve.gpucheck.check_run import CheckRun, PartResult
from vllm_agentserve.gpucheck.engines import Setting, engine_arguments
from vllm_agentserve.gpucheck.schedule import Span
from vllm_agentserve.gpucheck.summary import Done


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


@pytest.mark.slow
def test_a_task_that_hangs_is_ended_and_shows_where_it_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = here(tmp_path)
    monkeypatch.setattr(check_run, "STACK_BEFORE_END_S", 0.5)
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
    def broken(where: CheckRun) -> PartResult:
        raise RuntimeError("out of luck")

    parts = {
        "a": command.Part("First", broken, Span("a", 1, 9)),
        "b": command.Part("Second", lambda where: PartResult("ok", f"{where.left_s():.0f} s"), Span("b", 1, 9)),
        "c": command.Part("Third", broken, Span("c", 90, 99)),
    }
    monkeypatch.setattr(command, "PARTS", parts)
    done = command.run_parts(here(tmp_path), list(parts), 20, "command")
    assert [one.finding.status for one in done] == ["failed", "ok", "not run"]
    assert "RuntimeError: out of luck" in done[0].finding.line
    assert done[1].finding.line == "9 s"
    assert "| Second | **ok** | 9 s |" in (tmp_path / "summary.md").read_text()


def test_the_summary_is_json_that_everybody_reads() -> None:
    done = [Done("a", "A", PartResult("ok", "fine", [], {"p99": math.nan, "rows": [(1, math.inf)]}), 1.0)]
    text = json.dumps(summary.figures(done, "command"), allow_nan=False)
    assert json.loads(text)["parts"]["a"]["figures"] == {"p99": None, "rows": [[1, None]]}


def test_shares_are_shown_against_the_largest() -> None:
    points = [{"work": "decode", "units": units, "tokens_per_s": 10.0 * units} for units in (2, 1)]
    assert throughput.table(points, "cores")[2:] == ["| 1 | 10 (50%) |", "| 2 | 20 (100%) |"]


@pytest.mark.slow
@needs_cpu_build
def test_the_command_without_a_gpu(tmp_path: Path) -> None:
    """What needs a GPU is said not to have run; nothing of it is made up."""
    given = ["--output", str(tmp_path), "--device", "cpu", "--small", "--parts", "green", "shares"]
    assert command.main(given) == 0
    found = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert {name: part["status"] for name, part in found.items()} == {
        "imports": "ok",
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
@pytest.mark.engine
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
        "import vllm_agentserve.gpucheck.command, vllm_agentserve.gpucheck.agents, vllm_agentserve.gpucheck.decoder_layers\n"
        "print('torch' in sys.modules, 'vllm' in sys.modules)"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"]
