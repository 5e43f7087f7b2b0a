"""Hardware queues for two lanes: asked for before CUDA starts in the worker, and said where that comes too late."""

import os
from typing import Any

import pytest
import torch

from tests.support.cuda_machine import arguments_of, machine
from tests.support.log_messages import log_messages
from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.vllm_compat import cuda, lanes

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    # Set and taken away again, so that what a test sets does not stay.
    monkeypatch.setenv(VARIABLE, "to be restored")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.setattr(lanes, "arguments_obstacle", lambda arguments: None)
    monkeypatch.setattr(lanes, "model_obstacle", lambda model: None)
    monkeypatch.setattr(lanes, "add_lane_connector", lambda arguments: None)
    found = machine(monkeypatch)
    found.platform.is_cpu = lambda: False
    return found


def arguments(gpu: Any) -> Any:
    given = arguments_of(gpu.config)
    given.create_model_config = lambda: gpu.config.model_config
    return given


@pytest.mark.parametrize("mode", ["lanes", "auto", "time-sliced"])
def test_queues_are_asked_for_with_the_lanes(gpu: Any, mode: str) -> None:
    lanes.choose_lanes(arguments(gpu), AgentServeConfig(mode=mode))
    assert os.environ.get(VARIABLE) == ("32" if mode == "lanes" else None), "mode auto leaves GPUs without lanes"


def test_cpus_have_no_such_queues(gpu: Any) -> None:
    gpu.platform.is_cpu = lambda: True
    assert lanes.choose_lanes(arguments(gpu), AgentServeConfig(mode="lanes")) is None
    assert VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("found", "started", "own_process", "says"),
    [
        (None, False, False, None),
        (None, True, True, None),
        (None, True, False, "CUDA has started in this process before"),
        ("32", True, False, None),
        ("8", False, True, "is 8, so the lanes may wait for one another"),
        ("1", True, False, "is 1, so the lanes may wait for one another"),
    ],
)
def test_what_comes_too_late_is_said(
    gpu: Any,
    monkeypatch: pytest.MonkeyPatch,
    found: str | None,
    started: bool,
    own_process: bool,
    says: str | None,
) -> None:
    if found is not None:
        monkeypatch.setenv(VARIABLE, found)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(own_process)))
    with log_messages() as messages:
        lanes.choose_lanes(arguments(gpu), AgentServeConfig(mode="lanes"))
    if says is None:
        assert messages == []
    else:
        (said,) = messages
        assert says in said
        assert f"set {VARIABLE}=32 in the environment" in said
    assert os.environ[VARIABLE] == (found or "32"), "a value of the user's stays"


def test_asking_does_not_start_cuda(gpu: Any) -> None:
    assert cuda.ask_for_queues() is None
    assert not torch.cuda.is_initialized()
