"""Which values of `--scheduler-cls` are our scheduler, and that the lane's connector refuses all others when it is made."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from tests.support.lane_provider import Lanes
from tests.support.schedulers import make_scheduler
from vllm_agentserve.lanes import connector
from vllm_agentserve.lanes.lane import NoLane
from vllm_agentserve.scheduler.scheduler import AgentScheduler, AsyncAgentScheduler
from vllm_agentserve.vllm_compat import SCHEDULER_NAME, LaneError, chooses_our_scheduler


class Derived(AgentScheduler):
    """Somebody's subclass of ours."""


class DerivedAsync(AsyncAgentScheduler):
    """The same of the one that schedules asynchronously."""


class Foreign(Scheduler):
    """Somebody's own."""


OURS = [
    SCHEDULER_NAME,
    "vllm_agentserve.scheduler.scheduler.AgentScheduler",
    "vllm_agentserve.scheduler.scheduler.AsyncAgentScheduler",
    AgentScheduler,
    AsyncAgentScheduler,
    f"{__name__}.Derived",
    f"{__name__}.DerivedAsync",
    Derived,
    DerivedAsync,
]
OTHERS = [
    None,
    "",
    "Scheduler",
    "vllm.v1.core.sched.scheduler.Scheduler",
    "vllm.v1.core.sched.async_scheduler.AsyncScheduler",
    "no_such_module.Scheduler",
    f"{__name__}.NoSuchClass",
    f"{__name__}.Foreign",
    Scheduler,
    AsyncScheduler,
    Foreign,
]


def config_with(chosen: Any) -> Any:
    return SimpleNamespace(scheduler_config=SimpleNamespace(scheduler_cls=chosen), additional_config={})


@pytest.mark.parametrize("chosen", OURS)
def test_our_scheduler_is_known_as_a_name_and_as_a_class_and_so_are_subclasses(chosen: Any) -> None:
    assert chooses_our_scheduler(config_with(chosen))


@pytest.mark.parametrize("chosen", OTHERS)
def test_other_schedulers_are_not_taken_for_ours(chosen: Any) -> None:
    assert not chooses_our_scheduler(config_with(chosen))


@pytest.mark.parametrize("role", list(KVConnectorRole))
@pytest.mark.parametrize("chosen", OTHERS)
def test_both_halves_of_the_lanes_connector_refuse_another_scheduler_when_they_are_made(
    chosen: Any, role: KVConnectorRole, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(connector, "lane_provider", lambda *given: made.append(given))
    monkeypatch.setattr(connector, "refuse_weight_updates", lambda: made.append("weights"))
    name = f"{chosen.__module__}.{chosen.__qualname__}" if isinstance(chosen, type) else chosen
    with pytest.raises(LaneError) as raised:
        connector.LaneConnector(config_with(chosen), role, None)
    assert str(raised.value) == (
        f"--scheduler-cls = {name!r} cannot be combined with the KV connector 'LaneConnector', which needs "
        "vllm_agentserve.AgentScheduler or a subclass of it: give --scheduler-cls vllm_agentserve.AgentScheduler, or leave "
        "--kv-transfer-config out"
    )
    assert made == []


@pytest.mark.parametrize("role", list(KVConnectorRole))
@pytest.mark.parametrize("chosen", OURS)
def test_both_halves_are_made_for_our_scheduler(
    chosen: Any, role: KVConnectorRole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVConnectorBase_V1, "__init__", lambda self, *given: None)
    monkeypatch.setattr(connector, "lane_provider", lambda *given: Lanes(NoLane))
    monkeypatch.setattr(connector, "refuse_weight_updates", lambda: None)
    connector.LaneConnector(config_with(chosen), role, None)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_vllms_own_scheduler_does_not_start_with_the_lanes_connector(asynchronous: bool) -> None:
    with pytest.raises(
        LaneError, match=r"--scheduler-cls = None cannot be combined with the KV connector 'LaneConnector'"
    ):
        make_scheduler(ours=False, asynchronous=asynchronous, lanes=True)
