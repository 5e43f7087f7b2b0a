"""CUDA: the ladder of green contexts, each slot two disjoint groups of streaming multiprocessors (SMs) with a stream on each."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_agentserve.lanes.lane import Slot
from vllm_agentserve.policy.reserve import DECODE_SHARES
from vllm_agentserve.vllm_compat import LaneError

BARRIER_SMS = 16
"""A decode slot has more SMs than this: sampling kernels with a barrier over so many blocks would wait for ever on fewer."""
INSTEAD = "or use mode 'time-sliced', which needs no green contexts"
REMEDIES = {
    "CUDA_ERROR_NOT_SUPPORTED": "install an NVIDIA driver 550 (CUDA 12.4) or newer, and run without MIG and MPS",
    "CUDA_ERROR_NOT_FOUND": "install a newer NVIDIA driver",
    "CUDA_ERROR_OUT_OF_MEMORY": "lower --gpu-memory-utilization",
    "CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION": "set another 'lane_decode_share'",
    "CUDA_ERROR_INVALID_RESOURCE_TYPE": "install an NVIDIA driver 550 (CUDA 12.4) or newer",
}


@dataclass(frozen=True)
class SlotStreams:
    """The streams of one slot; work on one never runs on an SM of the other."""

    decode: Any
    prefill: Any


def granularity(major: int) -> tuple[int, int]:
    """Smallest group of SMs and the step between sizes, by compute capability, for drivers that do not report them."""
    return (8, 8) if major >= 9 else (4, 2)


def split_sizes(units: int, smallest: int, step: int, shares: Sequence[float] = DECODE_SHARES) -> tuple[int, ...]:
    """How many SMs to ask for the decode lane, growing, without repetition; empty when the device is too small.

    Args:
        units: SMs of the device.
        smallest: a group has at least so many.
        step: sizes are multiples of it; what is left over goes to the prefill lane.
        shares: of the device, each in (0, 1), rounded to the nearest size that leaves the prefill lane a group.
    """
    floor = -(-max(smallest, BARRIER_SMS + 1) // step) * step
    ceiling = (units - smallest) // step * step
    if ceiling < floor:
        return ()
    return tuple(sorted({min(max(int(share * units / step + 0.5) * step, floor), ceiling) for share in shares}))


def call(driver: Any, name: str, *arguments: Any) -> Any:
    """What a call to the driver returns beside its error code, None if nothing. Raises `LaneError` with the call and a remedy."""
    try:
        error, *values = getattr(driver, name)(*arguments)
    except (AttributeError, RuntimeError) as missing:
        # The bindings, or the driver below them, are older than the call.
        raise LaneError(
            f"{name} is missing ({missing}): install newer cuda-bindings and driver, {INSTEAD}"
        ) from missing
    if int(error) != 0:
        known, text = driver.cuGetErrorName(error)
        cause = text.decode() if int(known) == 0 and isinstance(text, bytes) else f"CUDA error {int(error)}"
        raise LaneError(f"{name} failed: {cause}; {REMEDIES.get(cause, 'look for earlier CUDA errors')}, {INSTEAD}")
    return None if not values else values[0] if len(values) == 1 else tuple(values)


def splits(driver: Any, device: Any, shares: Sequence[float]) -> list[tuple[Any, Any]]:
    """The device's SMs split once per slot, by growing group: the group, for decode, and the remainder, for prefill. Both are
    resources of the driver; nothing is created. The sizes that the driver reports take precedence over those of the compute
    capability.

    Raises:
        LaneError: the device is too small, or the driver refuses.
    """
    whole = call(driver, "cuDeviceGetDevResource", device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    smallest, step = granularity(int(call(driver, "cuDeviceGetAttribute", attribute, device)))
    # Older bindings do not have these two.
    smallest = int(getattr(whole.sm, "minSmPartitionSize", 0)) or smallest
    step = int(getattr(whole.sm, "smCoscheduledAlignment", 0)) or step
    units = int(whole.sm.smCount)
    found: dict[int, tuple[Any, Any]] = {}
    for size in split_sizes(units, smallest, step, shares):
        group, _, rest = call(driver, "cuDevSmResourceSplitByCount", 1, whole, 0, size)
        granted = int(group[0].sm.smCount)
        if granted > BARRIER_SMS and int(rest.sm.smCount) >= smallest:
            found.setdefault(granted, (group[0], rest))
    if not found:
        raise LaneError(
            f"this GPU has {units} streaming multiprocessors in groups of at least {smallest}: too few for a decode lane "
            f"of more than {BARRIER_SMS} and a prefill lane; use mode 'time-sliced'"
        )
    return list(found.values())


@dataclass(frozen=True)
class Device:
    """A GPU and how a ladder would divide it.

    Attributes:
        major: compute capability.
        units: its SMs.
        slots: in SMs, as the driver grants them.
    """

    major: int
    units: int
    slots: tuple[Slot, ...]


def device_plan(driver: Any, ordinal: int, shares: Sequence[float] = DECODE_SHARES) -> Device:
    """How a ladder would divide this device; makes no CUDA context.

    Raises:
        LaneError: as `splits`, or there is no such device.
    """
    call(driver, "cuInit", 0)
    device = call(driver, "cuDeviceGet", ordinal)
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    slots = tuple(Slot(int(group.sm.smCount), int(rest.sm.smCount)) for group, rest in splits(driver, device, shares))
    return Device(
        int(call(driver, "cuDeviceGetAttribute", attribute, device)), slots[0].decode + slots[0].prefill, slots
    )


def balanced_queues(driver: Any, device: Any) -> Any:
    """The resource that gives a green context hardware queues apart from those of other contexts that have it, so that lanes do
    not wait for one another in a shared queue; None where driver or bindings are older than CUDA 13.1.

    A context of ours has one stream, so it asks for one: the contexts of all slots together stay below what the device has.
    """
    kinds, scopes = driver.CUdevResourceType, getattr(driver, "CUdevWorkqueueConfigScope", None)
    kind = getattr(kinds, "CU_DEV_RESOURCE_TYPE_WORKQUEUE_CONFIG", None)
    if kind is None or scopes is None:
        return None
    try:
        queues = call(driver, "cuDeviceGetDevResource", device, kind)
        queues.wqConfig.sharingScope = scopes.CU_WORKQUEUE_SCOPE_GREEN_CTX_BALANCED
        queues.wqConfig.wqConcurrencyLimit = 1
    except (LaneError, AttributeError, TypeError):
        # A driver older than the bindings, or bindings with other names: the lanes work without queues of their own.
        return None
    return queues


class GreenLadder:
    """Slots by growing share of the decode lane. One split makes a slot: its group decodes, its remainder prefills, so the two
    are disjoint whatever sizes the driver grants.

    Args:
        driver: the module `cuda.bindings.driver`.
        device: CUDA ordinal; its primary context must be current.
        shares: of the decode lane, see `split_sizes`.
        wrap: makes a stream of the framework from a driver's handle.

    Raises:
        LaneError: the device is too small, or the driver refuses; nothing is left behind.
    """

    def __init__(self, driver: Any, device: int, shares: Sequence[float], wrap: Callable[[int], Any]) -> None:
        self._driver = driver
        self._wrap = wrap
        self._queues: Any = None
        self._contexts: list[Any] = []
        self._handles: list[Any] = []
        self._slots: list[Slot] = []
        self._streams: list[SlotStreams] = []
        try:
            self._create(device, shares)
        except BaseException:
            with contextlib.suppress(LaneError):  # the first error is the one to tell
                self.close()
            raise

    @property
    def slots(self) -> tuple[Slot, ...]:
        """In SMs, as granted."""
        return tuple(self._slots)

    @property
    def own_queues(self) -> bool:
        """Whether each lane has hardware queues apart from the other's."""
        return self._queues is not None

    @property
    def streams(self) -> tuple[SlotStreams, ...]:
        return tuple(self._streams)

    def _create(self, ordinal: int, shares: Sequence[float]) -> None:
        device = self._call("cuDeviceGet", ordinal)
        pairs = splits(self._driver, device, shares)
        self._queues = balanced_queues(self._driver, device)
        least, greatest = self._call("cuCtxGetStreamPriorityRange")
        for group, rest in pairs:
            decode, decode_stream = self._lane(group, device, int(greatest))
            prefill, prefill_stream = self._lane(rest, device, int(least))
            self._slots.append(Slot(decode, prefill))
            self._streams.append(SlotStreams(decode_stream, prefill_stream))

    def _lane(self, resource: Any, device: Any, priority: int) -> tuple[int, Any]:
        """A context with a stream on it; returns how many SMs it was granted, and the stream."""
        context = self._context(resource, device)
        self._contexts.append(context)
        kind = self._driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        granted = int(self._call("cuGreenCtxGetDevResource", context, kind).sm.smCount)
        non_blocking = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        handle = self._call("cuGreenCtxStreamCreate", context, non_blocking, priority)
        self._handles.append(handle)
        return granted, self._wrap(int(handle))

    def _context(self, resource: Any, device: Any) -> Any:
        """A context on these SMs, with hardware queues of its own where the driver grants them."""
        flags = self._driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        if self._queues is not None:
            try:
                descriptor = self._call("cuDevResourceGenerateDesc", [resource, self._queues], 2)
                return self._call("cuGreenCtxCreate", descriptor, device, flags)
            except LaneError:
                # A driver that has the resource and does not grant it: the lanes work without queues of their own.
                self._queues = None
        descriptor = self._call("cuDevResourceGenerateDesc", [resource], 1)
        return self._call("cuGreenCtxCreate", descriptor, device, flags)

    def _call(self, name: str, *arguments: Any) -> Any:
        return call(self._driver, name, *arguments)

    def close(self) -> None:
        """Destroys streams, then their contexts. No work may be under way on them, and no CUDA graph of theirs be kept.

        Raises:
            LaneError: the driver's first refusal, after all have been tried.
        """
        refusals: list[LaneError] = []
        for name, things in (("cuStreamDestroy", self._handles), ("cuGreenCtxDestroy", self._contexts)):
            while things:
                try:
                    self._call(name, things.pop())
                except LaneError as refusal:
                    refusals.append(refusal)
        self._slots.clear()
        self._streams.clear()
        if refusals:
            raise refusals[0]
