"""What a benchmark observes beside the tokens: the machine, the GPU through NVML, KV cache sizes; all without either."""

import sys
import time
import types
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.bench_servers import small
from tests.support.token_server import token_server
from vllm_agentserve.bench.arms import Arm, parse_arms
from vllm_agentserve.bench.conditions import Conditions, GpuWatch, pollution
from vllm_agentserve.bench.demo import demo_plan, sentence
from vllm_agentserve.bench.experiment import Experiment
from vllm_agentserve.bench.machine import gpu_names, in_words, shown
from vllm_agentserve.bench.plan import Cell, Plan
from vllm_agentserve.bench.progress import Progress
from vllm_agentserve.bench.server import RunningServer


class FakeNvml(types.ModuleType):
    """One GPU that draws 300 W at 2.4 GHz and is throttled by heat."""

    NVML_CLOCK_SM = 1
    nvmlClocksEventReasonSwPowerCap = 4
    nvmlClocksEventReasonSwThermalSlowdown = 32

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.began = time.monotonic()
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, _: int) -> str:
        return "NVIDIA GeForce RTX 5090"

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.65.06"

    def nvmlDeviceGetMemoryInfo(self, _: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(total=32 << 30)

    def nvmlDeviceGetPowerUsage(self, _: int) -> int:
        return 300_000

    def nvmlDeviceGetTotalEnergyConsumption(self, _: int) -> float:
        return 300_000 * (time.monotonic() - self.began)

    def nvmlDeviceGetClockInfo(self, _: int, kind: int) -> int:
        assert kind == self.NVML_CLOCK_SM
        return 2400

    def nvmlDeviceGetUtilizationRates(self, _: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(gpu=93)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _: int) -> int:
        return self.nvmlClocksEventReasonSwPowerCap | self.nvmlClocksEventReasonSwThermalSlowdown


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_gpu_figures(nvml: FakeNvml) -> None:
    began = time.monotonic()
    with Conditions() as conditions:
        time.sleep(0.7)
    took_s = time.monotonic() - began
    assert nvml.open == 0
    report = conditions.gpu.report(tokens=100)
    assert (report["watts"], report["sm_mhz"], report["utilisation_percent"]) == (300.0, 2400.0, 93.0)
    # It counts from a moment after `began` until one before `took_s` was read, however far apart a busy machine puts them.
    assert 300 * 0.7 / 100 - 1e-4 <= report["joules_per_token"] <= 300 * took_s / 100 + 1e-4
    found = conditions.report()
    assert found["gpu_throttling"] == ["software power cap", "software thermal slowdown"]
    assert "GPU throttled: software thermal slowdown" in pollution(found)
    assert gpu_names() == ["NVIDIA GeForce RTX 5090, 32 GiB, driver 580.65.06"]


def test_a_gpu_that_does_not_count_energy(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> float:
        raise nvml.NVMLError

    monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", refuse)
    watch = GpuWatch()
    watch.start()
    time.sleep(0.5)
    watch.stop()
    assert "joules_per_token" not in watch.report(10)
    assert watch.report(10)["watts"] == 300.0


def test_without_a_gpu_there_are_no_gpu_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with Conditions() as conditions:
        pass
    assert conditions.gpu.report(10) == {}
    assert gpu_names() == []


def test_our_own_work_is_not_pollution() -> None:
    """As much of a core as the operating system says this process had, however busy the machine is."""
    with Conditions() as conditions:
        began, worked = time.perf_counter(), time.process_time()
        while time.process_time() - worked < 0.5:
            pass
        cores = (time.process_time() - worked) / (time.perf_counter() - began)
    report = conditions.report()
    assert report["our_cores"] == pytest.approx(cores, rel=0.2)
    assert report["clock_step_s"] < 0.05
    assert 0.01 < report["page_touch_us"] < 1e5
    assert len(report["work_ms"]) == 2
    assert all(0.01 < ms < 1e4 for ms in report["work_ms"])


def test_on_a_gpu_every_arm_gets_the_size_the_first_start_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(
        parse_arms(["stock", "agentserve"], []), [Cell("", small, {"name": "x"})], model="m", rounds=1, slo_factor=0
    )
    started = []
    with token_server("--interval-s", "0.003", "--blocks", "1000") as url, Progress(Console(quiet=True)) as progress:

        def server(self: Experiment, arm: Arm, log: Path | None = None) -> RunningServer:
            started.append((arm.name, self.options))
            return RunningServer(url)

        monkeypatch.setattr(Experiment, "server", server)
        Experiment(plan, tmp_path / "r", progress).run()
    sizing, *arms = started
    assert sizing[0] == "stock"
    assert "--num-gpu-blocks-override" not in sizing[1]
    assert [name for name, _ in arms] == ["stock", "agentserve"]
    assert all(options[-2:] == ("--num-gpu-blocks-override", "950") for _, options in arms)


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({}, ("--max-model-len", "2048")),
        ({"kv_bytes": 1 << 30}, ("--max-model-len", "2048", "--kv-cache-memory-bytes", "1073741824")),
        ({"serve": ("--max-model-len", "9000")}, ("--max-model-len", "9000")),
    ],
)
def test_options_of_every_server(tmp_path: Path, more: dict, options: tuple) -> None:
    plan = Plan(parse_arms(["stock"], []), [Cell("", small, {"name": "x"})], model="m", **more)
    with Progress(Console(quiet=True)) as progress:
        assert Experiment(plan, tmp_path / "r", progress).options == options


def test_arms_take_turns_and_none_always_follows_the_same() -> None:
    plan = Plan(parse_arms(["stock", "agentserve", "stock-chunk=64"], []), [Cell("", small, {"name": "x"})])
    orders = [[arm.name for arm in plan.order(number)] for number in range(3)]
    assert orders[0] == ["stock", "agentserve", "stock-chunk=64"]
    assert sorted(order[0] for order in orders) == sorted(orders[0])


def test_nothing_of_the_machine_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert shown(f"{tmp_path}/home/model") == "./home/model"
    monkeypatch.chdir("/")
    assert shown(f"{tmp_path}/home/model") == "~/model"
    assert shown(sys.executable) == "python"
    words = in_words({"gpus": [], "cores": 2, "cpu": "X", "memory_gib": 24, "vllm": "1", "torch": "2", "python": "3"})
    assert words.startswith("no GPU, 2 cores of X; 24 GiB")


def test_the_demo_is_one_round_of_both_arms(toy_model: Path) -> None:
    plan = demo_plan(str(toy_model), True, agents=3, turns=2, port=None, settings={"tpot_slo_ms": 40})
    assert [arm.name for arm in plan.arms] == ["stock", "agentserve"]
    assert plan.arms[1].options[-1] == '{"agentserve": {"tpot_slo_ms": 40}}'
    assert (plan.rounds, plan.slo_factor, len(plan.cells[0].sessions(0))) == (1, 0.0, 3)


def test_the_sentence_under_the_demo() -> None:
    def findings(stock: dict, ours: dict) -> types.SimpleNamespace:
        arms = {"stock": {"figures": stock}, "agentserve": {"figures": ours}}
        return types.SimpleNamespace(figures=arms, summary={"arms": arms})

    stock = {"itl_cold_p99_ms": 500.0, "ttft_cold_mean_ms": 400.0, "ttft_resume_mean_ms": 80.0}
    ours = {"itl_cold_p99_ms": 50.0, "ttft_cold_mean_ms": 500.0, "ttft_resume_mean_ms": 60.0}
    assert sentence(findings(stock, ours)) == (
        "While one agent's prompt is read, the others' worst gaps (p99) go from 500 ms to 50 ms; that agent's first token takes "
        "1.25 times as long, and an agent that comes back from a tool waits 0.75 times as long for its next one."
    )
    assert sentence(findings(stock, ours | {"itl_cold_p99_ms": None})) == ""
    few = [side | {"itl_cold_p99_ms": None, "itl_cold_max_ms": most} for side, most in ((stock, 600.0), (ours, 70.0))]
    assert sentence(findings(*few)).startswith(
        "While one agent's prompt is read, the others' worst gap goes from 600 ms to 70 ms; that agent's first token takes"
    )
