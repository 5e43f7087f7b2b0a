"""The ladder of green contexts: which multiprocessors each lane gets, and what a refusing driver leaves behind."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.support.cuda_fakes import FakeDriver
from vllm_agentserve.lanes.cuda.green import GreenLadder, split_sizes
from vllm_agentserve.lanes.lane import Slot
from vllm_agentserve.policy.reserve import DECODE_SHARES
from vllm_agentserve.vllm_compat import LaneError


@pytest.mark.parametrize(
    ("device", "units", "smallest", "step", "sizes"),
    [
        ("H200", 132, 8, 8, (32, 64, 96)),
        ("RTX 5090", 170, 8, 8, (40, 88, 128)),
        ("B200", 148, 8, 8, (40, 72, 112)),
        ("A100", 108, 4, 2, (28, 54, 82)),
        ("RTX 4090", 128, 4, 2, (32, 64, 96)),
        ("RTX 3060", 28, 4, 2, (18, 22)),
        ("smallest of 9.0", 32, 8, 8, (24,)),
        ("smallest of 8.x", 22, 4, 2, (18,)),
        ("too small for 9.0", 31, 8, 8, ()),
        ("too small for 8.x", 21, 4, 2, ()),
    ],
)
def test_split_sizes(device: str, units: int, smallest: int, step: int, sizes: tuple[int, ...]) -> None:
    assert split_sizes(units, smallest, step) == sizes


@pytest.mark.parametrize(("share", "size"), [(0.05, 24), (0.5, 64), (0.95, 120)])
def test_a_share_of_the_users_own(share: float, size: int) -> None:
    """Rounded to what leaves decode more than 16 SMs and prefill a group."""
    assert split_sizes(132, 8, 8, (share,)) == (size,)


def ladder_of(driver: FakeDriver, shares: Sequence[float] = DECODE_SHARES) -> GreenLadder:
    return GreenLadder(driver, 0, shares, wrap=lambda handle: handle)


@pytest.mark.parametrize("tells", [True, False])
def test_lanes_of_a_slot_are_disjoint_and_cover_the_device(tells: bool) -> None:
    driver = FakeDriver(132, tells=tells)
    ladder = ladder_of(driver)
    assert ladder.slots == (Slot(32, 100), Slot(64, 68), Slot(96, 36))
    for slot, streams in zip(ladder.slots, ladder.streams, strict=True):
        (decode, urgent), (prefill, patient) = driver.streams[streams.decode], driver.streams[streams.prefill]
        assert not driver.contexts[decode] & driver.contexts[prefill]
        assert driver.contexts[decode] | driver.contexts[prefill] == set(range(132))
        assert (len(driver.contexts[decode]), len(driver.contexts[prefill])) == (slot.decode, slot.prefill)
        assert urgent < patient


def test_slots_are_what_was_granted_and_differ() -> None:
    """A driver that grants in groups of 64 gives the first two asks the same slot."""
    ladder = ladder_of(FakeDriver(140, coarse=64))
    assert ladder.slots == (Slot(64, 76), Slot(128, 12))


def test_a_remainder_below_the_smallest_group_is_no_slot() -> None:
    assert ladder_of(FakeDriver(132, coarse=64)).slots == (Slot(64, 68),)


def test_a_device_that_is_too_small() -> None:
    driver = FakeDriver(20, 4, 2, major=8)
    with pytest.raises(LaneError, match=r"20 streaming multiprocessors.*time-sliced"):
        ladder_of(driver)
    assert not driver.contexts


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        ("cuDeviceGet", 1, "cuDeviceGet failed: CUDA_ERROR_INVALID_VALUE"),
        (
            "cuDeviceGetDevResource",
            801,
            "cuDeviceGetDevResource failed: CUDA_ERROR_NOT_SUPPORTED; install an NVIDIA driver",
        ),
        ("cuDevSmResourceSplitByCount", 1, "cuDevSmResourceSplitByCount failed"),
        ("cuDevResourceGenerateDesc", -1, "cuDevResourceGenerateDesc failed"),
        ("cuGreenCtxCreate", -2, "cuGreenCtxCreate failed: CUDA_ERROR_OUT_OF_MEMORY; lower --gpu-memory-utilization"),
        ("cuGreenCtxGetDevResource", -1, "cuGreenCtxGetDevResource failed"),
        ("cuGreenCtxStreamCreate", -77, "cuGreenCtxStreamCreate failed: CUDA error 77"),
    ],
)
def test_a_refusing_driver_is_named_and_leaves_nothing(call: str, code: int, message: str) -> None:
    driver = FakeDriver(132)
    driver.fails[call] = code
    with pytest.raises(LaneError, match=message) as failure:
        ladder_of(driver)
    assert "time-sliced" in str(failure.value)
    assert (driver.contexts, driver.streams) == ({}, {})


@pytest.mark.parametrize("missing", [AttributeError("no such attribute"), RuntimeError("function not found")])
def test_bindings_or_a_driver_without_green_contexts(missing: Exception) -> None:
    def raises(*arguments: Any) -> Any:
        raise missing

    driver = FakeDriver(132)
    driver.cuGreenCtxStreamCreate = raises  # type: ignore[method-assign]
    with pytest.raises(LaneError, match=r"cuGreenCtxStreamCreate is missing .*install newer cuda-bindings and driver"):
        ladder_of(driver)
    assert not driver.contexts


def test_close_destroys_all_even_when_one_is_refused() -> None:
    driver = FakeDriver(132)
    ladder = ladder_of(driver)
    driver.fails["cuStreamDestroy"] = 0
    ladder.close()
    ladder.close()
    assert (driver.contexts, driver.streams) == ({}, {})

    driver = FakeDriver(132)
    ladder = ladder_of(driver)
    driver.fails["cuGreenCtxDestroy"] = 1
    with pytest.raises(LaneError, match="cuGreenCtxDestroy failed"):
        ladder.close()
    assert driver.streams == {}
    assert driver.calls.count("cuGreenCtxDestroy") == 6
