"""`agentserve doctor` on machines with a GPU: the command as users call it; nvidia-smi and the driver are stubs."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.gpu_machine import GPUS, LANES, Machine, said
from vllm_agentserve import doctor_gpu
from vllm_agentserve.doctor_gpu import Level


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return lambda card="H100", tells=True: Machine(monkeypatch, tmp_path, card, tells)


@pytest.mark.parametrize("card", GPUS)
@pytest.mark.parametrize("tells", [True, False])
def test_what_would_run(machine: Any, capsys: pytest.CaptureFixture[str], card: str, tells: bool) -> None:
    here = machine(card, tells)
    code, words = said(capsys, *LANES)
    assert code == 0
    assert f"[     ok] GPU: {here.name}, driver 590.44.01" in words
    assert "[     ok] lanes: can run; they cost a second model runner over the same weights" in words
    assert f"decode + prefill: {here.slots}." in words
    assert f"cuBLAS workspaces of 7 streams alone are {here.workspaces} MiB" in words
    assert "sets memory aside for what chunks take beside a step: an estimate from the step that vLLM profiles" in words
    assert "6 green contexts are taken for 96 MiB" in words
    assert here.driver.contexts == {}, "it asks, and makes nothing"


def test_mode_auto_is_time_sliced_and_says_what_lanes_would_be(
    machine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    machine("RTX 3090")
    code, words = said(capsys)
    assert code == 0
    assert (
        "[   note] lanes: mode auto is time-sliced here: on the one GPU they ran on, agents took longer with lanes"
        in words
    )
    assert "With mode lanes:" in words
    assert "20+62, 42+40, 62+20" in words


def test_a_share_of_the_users_own(machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    machine("H100")
    _, words = said(capsys, "--options", '{"mode": "lanes", "lane_decode_share": 0.5}')
    assert "decode + prefill: 64+68. " in words
    assert "workspaces of 3 streams alone are 96 MiB" in words


@pytest.mark.parametrize(
    ("call", "code"),
    [("cuInit", 100), ("cuDeviceGetDevResource", 801), ("cuDevSmResourceSplitByCount", 801)],
)
def test_a_driver_that_refuses_green_contexts(
    machine: Any, capsys: pytest.CaptureFixture[str], call: str, code: int
) -> None:
    machine("RTX 5090").driver.fails[call] = code
    ended, words = said(capsys, *LANES)
    assert ended == 1
    assert f"[problem] lanes: {call} failed" in words
    assert "or use mode 'time-sliced', which needs no green contexts" in words
    ended, words = said(capsys)
    assert ended == 0
    assert f"[   note] lanes: mode auto is time-sliced here: {call} failed" in words


def test_an_old_driver(machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    machine("RTX A5000").driver.version = 12020
    code, words = said(capsys, *LANES)
    assert code == 1
    assert "supports CUDA 12.2, green contexts need 12.4: install driver 550" in words


def test_under_mig(machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    here = machine("H100")
    here.mig = "Enabled"
    here.write()
    here.driver.units = 60
    code, words = said(capsys, *LANES)
    assert code == 0
    assert "[   note] MIG: MIG is on: vLLM runs on one instance" in words
    assert "use mode 'time-sliced'" in words
    assert "of 60 multiprocessors, decode + prefill: 24+36, 32+28, 48+12" in words, "those of the instance"


@pytest.mark.parametrize(
    "answer", ["[N/A]", "[Not Supported]", 'Field "mig.mode.current" is not a valid field to query.']
)
def test_cards_without_mig(machine: Any, capsys: pytest.CaptureFixture[str], answer: str) -> None:
    here = machine("RTX 3090")
    here.mig = answer.replace('"', "'")
    here.write()
    assert "MIG" not in said(capsys, *LANES)[1]


@pytest.mark.parametrize("by", ["variable", "socket"])
def test_under_mps(
    machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, by: str
) -> None:
    machine("H100")
    if by == "variable":
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    else:
        (tmp_path / "mps").mkdir()
        (tmp_path / "mps" / "control").touch()
        monkeypatch.setattr(doctor_gpu, "MPS_FOLDER", str(tmp_path / "mps"))
    code, words = said(capsys, *LANES)
    assert code == 0
    assert "[   note] MPS: MPS is on: green contexts work beneath it" in words
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "40")
    code, words = said(capsys, *LANES)
    assert code == 1
    assert "[problem] lanes: CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=40 lets MPS choose the multiprocessors" in words


@pytest.mark.parametrize(
    ("line", "driver"),
    [
        ("NVIDIA GB10, 580.95.05, [N/A], [N/A]", True),
        ("Orin (nvgpu), 540.4.0, [N/A], [N/A]", True),
        ("NVIDIA GB10, 580.95.05, 131072, [Not Supported]", True),
        ("NVIDIA A100, 540.4.0, [N/A], [N/A]", False),
    ],
)
def test_memory_that_is_not_told_is_no_problem(line: str, driver: bool) -> None:
    found = doctor_gpu.gpu_findings(line)
    assert [one.level for one in found] == [Level.OK if driver else Level.PROBLEM, Level.NOTE]
    assert "does not tell how much" in found[1].found


def test_an_answer_that_is_none_is_a_problem() -> None:
    for line in ("No devices were found", "NVIDIA GB10, 580.95.05, lots, [N/A]"):
        assert [one.level for one in doctor_gpu.gpu_findings(line)] == [Level.PROBLEM]


@pytest.mark.parametrize(("free", "says"), [(500, True), (799, True), (800, False), (1000, False)])
def test_memory_that_others_hold(free: int, says: bool) -> None:
    found = doctor_gpu.gpu_findings(f"NVIDIA H200, 590.44.01, 1000, {free}")
    assert [one.found for one in found[1:]] == ([f"{free} of 1000 MiB free"] if says else [])


# -- arguments of vLLM ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"offload_group_size": 8}, "prefetched weights pass through buffers"),
        ({"weight_transfer_config": {"backend": "nccl"}}, "weights are replaced while the engine runs"),
        ({"enable_sleep_mode": True}, "sleep mode unmaps memory"),
        ({"kv_offloading_size": 4}, "--kv-offloading-size would replace the lane's KV connector"),
        ({"worker_cls": "their.Worker"}, "--worker-cls is 'their.Worker'"),
        ({"quantization": "fp8"}, "kernels of quantization 'fp8'"),
        ({"cpu_offload_gb": 4}, None),
    ],
)
def test_arguments_that_lanes_do_not_fit(
    machine: Any, capsys: pytest.CaptureFixture[str], given: dict[str, Any], says: str | None
) -> None:
    machine("H100")
    code, words = said(capsys, *LANES, "--engine", json.dumps(given))
    assert code == (0 if says is None else 1), words
    assert ("[     ok] lanes: can run" if says is None else "[problem] lanes: ") in words
    assert says is None or says in words
    _, words = said(capsys, "--engine", json.dumps(given))
    assert "[   note] lanes: mode auto is time-sliced here: " in words


def test_arguments_with_a_model(machine: Any, capsys: pytest.CaptureFixture[str], toy_model: Path) -> None:
    machine("H100")
    code, words = said(capsys, *LANES, "--model", str(toy_model), "--engine", '{"ubatch_size": 2}')
    assert code == 1
    assert "leave out --ubatch-size" in words


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "is no object"),
        ('{"offload_group": 8}', "vLLM does not take"),
    ],
)
def test_arguments_that_vllm_does_not_take(
    machine: Any, capsys: pytest.CaptureFixture[str], given: str, says: str
) -> None:
    machine("H100")
    code, words = said(capsys, *LANES, "--engine", given)
    assert code == 1
    assert "[problem] engine arguments:" in words
    assert says in words
    assert "lanes:" not in words


class Broken(ModuleType):
    """A module of an installation that does not fit the machine."""

    def __getattr__(self, name: str) -> Any:
        raise OSError("undefined symbol")


@pytest.mark.parametrize("found", [None, Broken("vllm.engine.arg_utils")])
def test_arguments_without_a_vllm_that_can_be_imported(
    machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: ModuleType | None
) -> None:
    """That is what the command is for: the rest of what it finds is told."""
    machine("H100")
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", found)  # type: ignore[arg-type]
    code, words = said(capsys, *LANES, "--engine", '{"enable_lora": true}')
    assert code == 0, words
    assert "[   note] engine arguments: not checked, because vLLM cannot be imported: " in words
    assert "[     ok] GPU: NVIDIA H100" in words
    assert "lanes:" not in words
