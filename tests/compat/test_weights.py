"""Weights that are replaced while the engine runs: refused where there is a prefill lane, on CPUs and on GPUs."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.worker import gpu_worker

from tests.support.lane_provider import Lanes
from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.lanes import connector
from vllm_agentserve.lanes.connector_worker import LaneConnectorWorker
from vllm_agentserve.vllm_compat import LaneError, weights


class Runner:
    def __init__(self) -> None:
        self.reloaded = 0

    def reload_weights(self) -> None:
        self.reloaded += 1


@pytest.fixture
def worker_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's GPU worker in a process where a lane's connector has been made; afterwards it is stock again."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
    from vllm.v1.worker.gpu_worker import Worker

    for name in weights.UPDATES:
        monkeypatch.setattr(Worker, name, getattr(Worker, name))
    monkeypatch.setattr(KVConnectorBase_V1, "__init__", lambda self, *given: None)
    monkeypatch.setattr(connector, "lane_provider", lambda *given: Lanes(Lane))
    chosen = SimpleNamespace(scheduler_cls="vllm_agentserve.AgentScheduler")
    config: Any = SimpleNamespace(additional_config={}, scheduler_config=chosen)
    for _ in range(2):
        connector.LaneConnector(config, KVConnectorRole.WORKER, None)
    return Worker


def worker_of(worker_class: Any, connector_name: str | None) -> Any:
    worker = object.__new__(worker_class)
    transfer = None if connector_name is None else SimpleNamespace(kv_connector=connector_name)
    worker.vllm_config = SimpleNamespace(kv_transfer_config=transfer)
    worker.model_runner = Runner()
    worker.weight_transfer_engine = None
    return worker


@pytest.mark.parametrize("name", weights.UPDATES)
def test_a_worker_with_a_lane_refuses(worker_class: Any, name: str) -> None:
    worker = worker_of(worker_class, "LaneConnector")
    with pytest.raises(LaneError, match=f"{name} is refused: the prefill lane .* mode 'time-sliced'"):
        getattr(worker, name)()


class Half:
    """The worker's half of the connector."""

    def __init__(self, may_have_lane: bool) -> None:
        self.may_have_lane = may_have_lane


@pytest.mark.parametrize("may_have_lane", [False, True])
def test_a_worker_whose_lane_is_gone_takes_new_weights(
    worker_class: Any, monkeypatch: pytest.MonkeyPatch, may_have_lane: bool
) -> None:
    """In mode auto a lane that cannot run is given up at start; on a GPU an ended one is never made again."""
    monkeypatch.setattr(weights, "local_worker_half", lambda: Half(may_have_lane))
    monkeypatch.setattr(gpu_worker, "set_current_vllm_config", lambda config: nullcontext())
    worker = worker_of(worker_class, "LaneConnector")
    if may_have_lane:
        with pytest.raises(LaneError, match="reload_weights is refused"):
            worker.reload_weights()
    else:
        worker.reload_weights()
    assert worker.model_runner.reloaded == (0 if may_have_lane else 1)


class Lane:
    """A lane that may end."""

    name, ready, busy, gone, slots = "lane", True, False, False, ()

    def alive(self) -> bool:
        return not self.gone

    def report(self) -> None:
        return None

    def close(self) -> None: ...


def test_whether_there_may_be_a_lane() -> None:
    def refused() -> Any:
        raise LaneError("no")

    half = LaneConnectorWorker(AgentServeConfig(mode="auto"), Lanes(refused))
    assert half.may_have_lane, "it is made later"
    half.start()
    assert not half.may_have_lane
    lane: Any = Lane()
    half = LaneConnectorWorker(AgentServeConfig(mode="lanes"), Lanes(lambda: lane))
    half.start()
    assert half.may_have_lane
    half.after_step(set())
    assert half.may_have_lane
    lane.gone = True
    half.after_step(set())
    assert not half.may_have_lane, "it has ended"
    again = LaneConnectorWorker(AgentServeConfig(mode="lanes"), Lanes(lambda: lane, Lane))  # type: ignore[arg-type]
    again.start()
    again.after_step(set())
    assert again.may_have_lane, "another one was made"


def test_the_cpu_worker_has_no_methods_of_its_own_for_it() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    assert set(weights.UPDATES) & set(vars(CPUWorker)) == {"sleep"}, "which does nothing there"


@pytest.mark.parametrize("other", [None, "OffloadingConnector"])
def test_other_engines_of_the_process_stay_as_they_are(
    worker_class: Any, monkeypatch: pytest.MonkeyPatch, other: str | None
) -> None:
    monkeypatch.setattr(gpu_worker, "set_current_vllm_config", lambda config: nullcontext())
    worker = worker_of(worker_class, other)
    worker.reload_weights()
    assert worker.model_runner.reloaded == 1
    with pytest.raises(RuntimeError, match="weight_transfer_config"):
        worker.update_weights({})


def test_every_method_of_a_worker_that_writes_weights_is_known(worker_class: Any) -> None:
    """A new one in vLLM has to be looked at: these read weights, or end what `init_weight_transfer_engine` began."""
    harmless = {
        "compute_weight_checksums",
        "shutdown_weight_transfer_engine",
        "supports_draft_weight_updates",
    }
    found = {name for name in dir(worker_class) if ("weight" in name or name == "sleep") and not name.startswith("_")}
    assert found - harmless == set(weights.UPDATES)
