"""Under which conditions a round ran: other people's CPU load, stolen time, the clock, the GPU; and whether that spoils it."""

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil

OTHERS_CORES = 0.15
"""More than this many cores busy for somebody else pollute a round."""
STOLEN_SHARE = 0.03
CLOCK_STEP_S = 0.05
LATENESS_P99_MS = 5.0
LATENESS_MAX_MS = 250.0
"""A single stall of the client, or of the whole machine, that spoils a round."""
LATENESS_SHARE = 0.03
"""Share of the time that the client was late, in sum: many short stalls, or one long one."""
PAGE_TOUCH_US = 4.0
"""Time in which a page of memory is there when it is first used; usually below 1. Where the host of a virtual machine takes free
memory back it is 5 to 11, and servers were half as fast in runs in which that was seen."""
PAGES_TOUCHED = 2048
WORK_NUMBERS, WORK_TIMES = 1 << 20, 51
"""Of the fixed work: so many products, so many times. On one thread: those of a library of matrix products would wait for each
other."""
GPU_SAMPLE_S = 0.2
THROTTLING = {
    "software power cap": "nvmlClocksEventReasonSwPowerCap",
    "hardware slowdown": "nvmlClocksThrottleReasonHwSlowdown",
    "software thermal slowdown": "nvmlClocksEventReasonSwThermalSlowdown",
    "hardware thermal slowdown": "nvmlClocksThrottleReasonHwThermalSlowdown",
    "hardware power brake": "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
}
HARMLESS = {"software power cap"}
"""Normal for a GPU under full load; reported, but it spoils nothing."""


class Conditions:
    """A context manager around one part of a round. This process and its children, the server too, are "ours".

    Args:
        lateness_ms: how late the client woke up, every time; grows while the part runs.
    """

    def __init__(self, lateness_ms: Sequence[float] = ()) -> None:
        self.lateness_ms = lateness_ms
        self.gpu = GpuWatch()
        self._end: dict[str, float] = {}
        self._page_touch_us = 0.0
        self._work_ms: list[float] = []

    def __enter__(self) -> "Conditions":
        self._page_touch_us = page_touch_us()
        self._work_ms = [work_ms()]
        self.gpu.start()
        self._begin = snapshot()
        return self

    def __exit__(self, *_: object) -> None:
        self._end = snapshot()
        self.gpu.stop()
        self._work_ms.append(work_ms())

    def report(self) -> dict[str, Any]:
        """Cores busy for us and for others, share of stolen time, clock step (s), how late the client woke up: p99 and
        largest (ms), and the sum as a share of the time; how long a page of memory took that was used first (us); and fixed work
        before and after (ms)."""
        spent = {name: self._end[name] - self._begin[name] for name in self._begin}
        seconds = max(spent["monotonic"], 1e-3)
        # A stall of seconds is one sample among many, so no quantile shows it; it is in the largest and in the sum.
        late = np.asarray(self.lateness_ms or [0.0])
        return {
            "our_cores": round(spent["ours"] / seconds, 3),
            "other_cores": round(max(spent["busy"] - spent["ours"], 0.0) / seconds, 3),
            "stolen_share": round(spent["steal"] / seconds / (os.cpu_count() or 1), 4),
            "clock_step_s": round(abs(spent["wall"] - spent["monotonic"]), 4),
            "client_lateness_p99_ms": round(float(np.quantile(late, 0.99)), 3),
            "client_lateness_max_ms": round(float(late.max()), 3),
            "client_late_share": round(float(late.clip(0).sum()) / 1000 / seconds, 4),
            "page_touch_us": round(self._page_touch_us, 2),
            "work_ms": [round(one, 3) for one in self._work_ms],
            "cpu_mhz": round(self._end["mhz"]) or None,
            "gpu_throttling": sorted(self.gpu.reasons),
        }


def pollution(report: dict[str, Any], local: bool = True) -> list[str]:
    """What in a report of conditions makes a round's figures doubtful, in words.

    Args:
        local: the server is ours. Somebody else's may run on this machine, and its CPU time is then not told from others'.
    """
    found = []
    if local and report["other_cores"] > OTHERS_CORES:
        found.append(f"other processes used {report['other_cores']:.2f} cores")
    if report["stolen_share"] > STOLEN_SHARE:
        found.append(f"{report['stolen_share']:.1%} of CPU time was stolen by the host")
    if report["clock_step_s"] > CLOCK_STEP_S:
        found.append(f"the wall clock was set by {report['clock_step_s']:.2f} s")
    if report["client_lateness_p99_ms"] > LATENESS_P99_MS:
        found.append(f"the client woke up {report['client_lateness_p99_ms']:.1f} ms late (p99)")
    if report.get("client_lateness_max_ms", 0.0) > LATENESS_MAX_MS:
        found.append(f"the client stood still for {report['client_lateness_max_ms']:.0f} ms once")
    if report.get("client_late_share", 0.0) > LATENESS_SHARE:
        found.append(f"the client was late for {report['client_late_share']:.1%} of the time")
    if local and report.get("page_touch_us", 0.0) > PAGE_TOUCH_US:
        found.append(f"new pages of memory took {report['page_touch_us']:.1f} us each")
    found += [f"GPU throttled: {reason}" for reason in report["gpu_throttling"] if reason not in HARMLESS]
    return found


def snapshot() -> dict[str, float]:
    """Clocks and CPU seconds now: of the whole machine (busy, stolen) and of this process with its children."""
    times = psutil.cpu_times()
    frequency = None
    with contextlib.suppress(Exception):
        frequency = psutil.cpu_freq()
    idle = times.idle + getattr(times, "iowait", 0.0)
    steal = getattr(times, "steal", 0.0)
    return {
        "monotonic": time.perf_counter(),
        "wall": time.time(),
        # Guests are counted in user time already.
        "busy": sum(times) - idle - steal - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0),
        "steal": steal,
        "ours": sum(cpu_seconds()),
        "mhz": frequency.current if frequency else 0.0,
    }


def page_touch_us() -> float:
    """How long a page of memory takes that is used for the first time, in us, over 8 MiB."""
    with mmap.mmap(-1, PAGES_TOUCHED * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        began = time.perf_counter()
        for page in range(PAGES_TOUCHED):
            memory[page * mmap.PAGESIZE] = 1
        return (time.perf_counter() - began) / PAGES_TOUCHED * 1e6


def work_ms() -> float:
    """How long the fixed work takes now, in ms; the median; asking takes less than 0.1 s."""
    numbers = np.ones(WORK_NUMBERS, np.float32)
    products = np.empty_like(numbers)
    taken = []
    for _ in range(WORK_TIMES):
        began = time.perf_counter()
        np.sqrt(numbers, out=products)
        np.multiply(numbers, products, out=products)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken)) * 1000


def cpu_seconds() -> Iterator[float]:
    root = psutil.Process()
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            spent = process.cpu_times()
            yield spent.user + spent.system


@dataclass
class GpuWatch:
    """Samples the first NVIDIA GPU from a thread; does nothing without one."""

    watts: list[float] = field(default_factory=list)
    sm_mhz: list[float] = field(default_factory=list)
    utilisation: list[float] = field(default_factory=list)
    reasons: set[str] = field(default_factory=set)
    joules: float | None = None

    def start(self) -> None:
        self._nvml: Any = None
        self._stop = threading.Event()
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(visible_gpu())
        except Exception:
            return  # no library, no driver, or no device
        self._nvml = pynvml
        self._began_mj = self._energy()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._nvml is None:
            return
        self._stop.set()
        self._thread.join()
        ended = self._energy()
        if self._began_mj is not None and ended is not None:
            self.joules = (ended - self._began_mj) / 1000
        self._nvml.nvmlShutdown()

    def _energy(self) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except Exception:
            return None  # before Volta

    def _sample(self) -> None:
        nvml, handle = self._nvml, self._handle
        while not self._stop.wait(GPU_SAMPLE_S):
            with contextlib.suppress(nvml.NVMLError):
                self.watts.append(nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
            with contextlib.suppress(nvml.NVMLError):
                self.sm_mhz.append(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
                self.utilisation.append(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            with contextlib.suppress(nvml.NVMLError):
                active = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
                self.reasons |= {name for name, bit in THROTTLING.items() if active & getattr(nvml, bit, 0)}

    def report(self, tokens: int) -> dict[str, float]:
        """Means over the part, and energy per generated token; empty without a GPU."""
        figures = {"watts": self.watts, "sm_mhz": self.sm_mhz, "utilisation_percent": self.utilisation}
        report = {name: round(float(np.mean(values)), 2) for name, values in figures.items() if values}
        if self.joules is not None and tokens:
            report["joules_per_token"] = round(self.joules / tokens, 4)
        return report


def visible_gpu() -> int:
    """NVML's index of the GPU that CUDA calls 0."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return int(first) if first.isdigit() else 0
