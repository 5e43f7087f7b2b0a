"""Hardware queues of green contexts, which CUDA 13.1 grants; and the slots of a device, known before there is a context."""

import pytest

from tests.support.cuda_fakes import FakeDriver, NewDriver
from vllm_agentserve.lanes.cuda.green import Device, GreenLadder, device_plan
from vllm_agentserve.lanes.lane import Slot
from vllm_agentserve.vllm_compat import LaneError


def ladder_of(driver: FakeDriver) -> GreenLadder:
    return GreenLadder(driver, 0, (0.25, 0.5, 0.75), wrap=lambda handle: handle)


def test_every_context_gets_a_queue_apart_from_the_others() -> None:
    driver = NewDriver(132)
    ladder = ladder_of(driver)
    assert ladder.own_queues
    assert driver.queues == [(1, 1)] * 6, "balanced; one stream each, so six of the eight queues there are by default"
    assert ladder.slots == (Slot(32, 100), Slot(64, 68), Slot(96, 36))


@pytest.mark.parametrize(("knows", "grants"), [(False, True), (True, False)])
def test_lanes_go_without_where_the_driver_is_older_or_refuses(knows: bool, grants: bool) -> None:
    driver = NewDriver(132, knows=knows, grants=grants)
    ladder = ladder_of(driver)
    assert not ladder.own_queues
    assert (driver.queues, len(driver.contexts)) == ([], 6)
    ladder.close()
    assert (driver.contexts, driver.streams) == ({}, {})


def test_older_bindings_are_not_asked() -> None:
    driver = FakeDriver(132)
    assert not ladder_of(driver).own_queues
    assert driver.calls.count("cuDeviceGetDevResource") == 1


def test_a_context_that_fails_without_queues_too_is_an_error() -> None:
    driver = NewDriver(132)
    driver.fails["cuGreenCtxCreate"] = 2
    with pytest.raises(LaneError, match="cuGreenCtxCreate failed: CUDA_ERROR_OUT_OF_MEMORY"):
        ladder_of(driver)
    assert (driver.contexts, driver.streams) == ({}, {})


# -- the plan ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coarse", [1, 64])
def test_the_plan_is_what_the_ladder_gets(coarse: int) -> None:
    driver = NewDriver(140, coarse=coarse)
    assert device_plan(driver, 0).slots == ladder_of(NewDriver(140, coarse=coarse)).slots
    assert driver.contexts == {}, "nothing is created for it"


def test_what_the_driver_tells_goes_before_what_is_known_of_the_architecture() -> None:
    """Reports of compute capability 12.0 differ; the driver of the machine decides."""
    plain = device_plan(NewDriver(170, tells=False, major=12), 0)
    assert plain == Device(12, 170, (Slot(40, 130), Slot(88, 82), Slot(128, 42)))
    assert device_plan(NewDriver(170, smallest=2, step=2, major=12), 0).slots == (
        Slot(42, 128),
        Slot(86, 84),
        Slot(128, 42),
    )


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGet", "cuDeviceGetDevResource", "cuDevSmResourceSplitByCount"])
def test_a_driver_that_refuses_leaves_time_slicing(call: str) -> None:
    driver = NewDriver(170, major=12)
    driver.fails[call] = 801
    with pytest.raises(
        LaneError, match=rf"{call} failed: CUDA_ERROR_NOT_SUPPORTED.*mode 'time-sliced', which needs no"
    ):
        device_plan(driver, 0)
