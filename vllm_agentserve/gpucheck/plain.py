"""The cheap rival of green contexts: two plain CUDA streams on the whole device, decode steps with the higher priority."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from vllm_agentserve.lanes.cuda.green import SlotStreams, call
from vllm_agentserve.lanes.lane import Slot
from vllm_agentserve.vllm_compat import LaneError


class PlainLadder:
    """A ladder with the interface of `lanes.cuda.green.GreenLadder` and one slot, on which both lanes may use every SM.

    Blocks of a decode step go first wherever an SM has room; blocks of a chunk that run already are not preempted.

    Its slot has all SMs on both sides, so a chunk beside decodes has the base length, and one of a lane that is alone twice that.

    Args:
        driver: the module `cuda.bindings.driver`.
        device: CUDA ordinal; its primary context must be current.
        shares: not used.
        wrap: makes a stream of the framework from a driver's handle.

    Raises:
        LaneError: the driver refuses; nothing is left behind.
    """

    def __init__(self, driver: Any, device: int, shares: Sequence[float], wrap: Callable[[int], Any]) -> None:
        self._driver = driver
        self._handles: list[Any] = []
        try:
            attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
            units = int(call(driver, "cuDeviceGetAttribute", attribute, call(driver, "cuDeviceGet", device)))
            least, greatest = call(driver, "cuCtxGetStreamPriorityRange")
            streams = [wrap(self._stream(int(priority))) for priority in (greatest, least)]
        except BaseException:
            with contextlib.suppress(LaneError):
                self.close()
            raise
        self._slots: tuple[Slot, ...] = (Slot(units, units),)
        self._streams: tuple[SlotStreams, ...] = (SlotStreams(*streams),)

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self._slots

    @property
    def own_queues(self) -> bool:
        """Plain streams have none."""
        return False

    @property
    def streams(self) -> tuple[SlotStreams, ...]:
        return self._streams

    def _stream(self, priority: int) -> int:
        non_blocking = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        handle = call(self._driver, "cuStreamCreateWithPriority", non_blocking, priority)
        self._handles.append(handle)
        return int(handle)

    def close(self) -> None:
        """Destroys the streams. Raises `LaneError` with the driver's refusal."""
        self._slots, self._streams = (), ()
        while self._handles:
            call(self._driver, "cuStreamDestroy", self._handles.pop())
