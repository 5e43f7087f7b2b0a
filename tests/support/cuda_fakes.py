"""A CUDA driver that splits multiprocessors; the device is in `cuda_device`."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

ERRORS = {1: b"CUDA_ERROR_INVALID_VALUE", 2: b"CUDA_ERROR_OUT_OF_MEMORY", 801: b"CUDA_ERROR_NOT_SUPPORTED"}


class FakeDriver:
    """`cuda.bindings.driver` for a device of `units` SMs.

    Args:
        units: SMs of the device.
        smallest, step: of a split, as the driver would tell.
        tells: whether the bindings are new enough to show these two.
        coarse: grants are rounded up to this, when the driver is less precise than it tells.
        major: compute capability.
    """

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM="sm")
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major")
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(
        self, units: int, smallest: int = 8, step: int = 8, tells: bool = True, coarse: int = 1, major: int = 9
    ) -> None:
        self.units, self.smallest, self.step = units, smallest, step
        self.tells, self.coarse, self.major = tells, coarse, major
        self.fails: dict[str, int] = {}
        """Error code by call; negative ones come only after the first success."""
        self.calls: list[str] = []
        self.asked: list[int] = []
        self.contexts: dict[int, set[int]] = {}
        self.streams: dict[int, tuple[int, int]] = {}
        """By handle: context and priority."""
        self.on_context: Callable[[int], None] = lambda change: None
        """Called when a context is made (1) or destroyed (-1)."""
        self.on_destroy: Callable[[int], None] = lambda handle: None
        """Called with the handle of a stream that is destroyed."""
        self._next = 100

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu") or name == "cuGetErrorName":
            return found

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            code = self.fails.get(name, 0)
            if code < 0:
                self.fails[name] = -code
            return (code,) if code > 0 else found(*arguments)

        return call

    def _resource(self, ids: Sequence[int]) -> Any:
        told = {"minSmPartitionSize": self.smallest, "smCoscheduledAlignment": self.step} if self.tells else {}
        return SimpleNamespace(sm=SimpleNamespace(smCount=len(ids), **told), ids=tuple(ids))

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def cuGetErrorName(self, error: int) -> Any:
        return (0, ERRORS[error]) if error in ERRORS else (1, None)

    def cuDeviceGet(self, ordinal: int) -> Any:
        return 0, ordinal

    def cuDeviceGetAttribute(self, attribute: str, device: int) -> Any:
        return 0, self.major

    def cuDeviceGetDevResource(self, device: int, kind: str) -> Any:
        return 0, self._resource(range(self.units))

    def cuCtxGetStreamPriorityRange(self) -> Any:
        return 0, 0, -5

    def cuDevSmResourceSplitByCount(self, groups: int, whole: Any, flags: int, count: int) -> Any:
        self.asked.append(count)
        step = max(self.step, self.coarse)
        granted = max(-(-count // step) * step, self.smallest)
        return 0, [self._resource(whole.ids[:granted])], 1, self._resource(whole.ids[granted:])

    def cuDevResourceGenerateDesc(self, resources: list[Any], count: int) -> Any:
        return 0, resources[0].ids

    def cuGreenCtxCreate(self, descriptor: tuple[int, ...], device: int, flags: int) -> Any:
        context = self._handle()
        self.contexts[context] = set(descriptor)
        self.on_context(1)
        return 0, context

    def cuGreenCtxGetDevResource(self, context: int, kind: str) -> Any:
        return 0, self._resource(sorted(self.contexts[context]))

    def cuGreenCtxStreamCreate(self, context: int, flags: int, priority: int) -> Any:
        handle = self._handle()
        self.streams[handle] = (context, priority)
        return 0, handle

    def cuStreamDestroy(self, handle: int) -> Any:
        self.on_destroy(handle)
        del self.streams[handle]
        return (0,)

    def cuGreenCtxDestroy(self, context: int) -> Any:
        assert context not in [owner for owner, _ in self.streams.values()], "a context destroyed before its stream"
        del self.contexts[context]
        self.on_context(-1)
        return (0,)


class NewDriver(FakeDriver):
    """Bindings of CUDA 13.1 and later, whose green contexts may be given hardware queues.

    Args:
        grants: what the driver below them does when it is asked for the resource, and when it is given it.
    """

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM="sm", CU_DEV_RESOURCE_TYPE_WORKQUEUE_CONFIG="queues")
    CUdevWorkqueueConfigScope = SimpleNamespace(
        CU_WORKQUEUE_SCOPE_DEVICE_CTX=0, CU_WORKQUEUE_SCOPE_GREEN_CTX_BALANCED=1
    )

    def __init__(self, units: int, knows: bool = True, grants: bool = True, **given: Any) -> None:
        super().__init__(units, **given)
        self.knows, self.grants = knows, grants
        self.queues: list[tuple[int, int]] = []
        """Of every context, in order: the scope of its queues, and how many."""
        self.version = 13010

    def cuDriverGetVersion(self) -> Any:
        return 0, self.version

    def cuInit(self, flags: int) -> Any:
        return (0,)

    def cuDeviceGetDevResource(self, device: int, kind: str) -> Any:
        if kind == "sm":
            return super().cuDeviceGetDevResource(device, kind)
        if not self.knows:
            return (914,)
        return 0, SimpleNamespace(wqConfig=SimpleNamespace(sharingScope=0, wqConcurrencyLimit=32))

    def cuDevResourceGenerateDesc(self, resources: list[Any], count: int) -> Any:
        assert count == len(resources)
        assert all(hasattr(one, "sm") for one in resources[:1])
        queues = [one.wqConfig for one in resources[1:]]
        if queues and not self.grants:
            return (801,)
        self.queues += [(one.sharingScope, one.wqConcurrencyLimit) for one in queues]
        return super().cuDevResourceGenerateDesc(resources[:1], 1)
