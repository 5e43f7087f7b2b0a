"""The prefill lane of a CPU worker: a process of its own, since two model runners in one process share C++ scratch memory."""

import contextlib
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.lanes.board import Board
from vllm_agentserve.lanes.cores import Cores
from vllm_agentserve.lanes.lane import LaneReport, Outcome, Slot
from vllm_agentserve.lanes.memory import KvMemory
from vllm_agentserve.lanes.runner import Setup
from vllm_agentserve.policy.jobs import Job
from vllm_agentserve.policy.slots import core_ladder
from vllm_agentserve.vllm_compat import LaneError, cpu

CHUNK_TOKENS = 256
"""Default of `lane_chunk_tokens` here: about a tenth of a second on one core."""
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 5.0
CHUNK_TIMEOUT_S = 60.0
"""A lane that has begun no chunk for so long while it has jobs hangs, and is ended."""


class ProcessLane:
    """The lane as the worker sees it; `LaneRunner` is the other end.

    Args:
        setup: what the process is told; its `board` is made here.
        cores: of the decode steps.
    """

    def __init__(self, setup: Setup, cores: Cores) -> None:
        self._setup = setup
        self._cores = cores
        self._board = Board()
        self._in_flight: set[str] = set()
        self._ready = False
        self._said_slots = False
        self._reported = 0.0, 0.0
        self._submitted = time.monotonic()
        self._connection, theirs = Pipe()
        inherited = (theirs.fileno(), setup.memory[1], self._board.descriptor)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_agentserve.lanes.runner", str(theirs.fileno()), str(os.getpid())],
            pass_fds=inherited,
            stdin=subprocess.DEVNULL,
            env=lane_environment(len(setup.all_cores)),
        )
        theirs.close()
        self._send(replace(setup, board=self._board.descriptor))

    @property
    def name(self) -> str:
        slots = ", ".join(f"{slot.decode}+{slot.prefill}" for slot in self.slots)
        return (
            f"process {self._process.pid}, {resident_mib(self._process.pid)} MiB of its own; cores for decode + prefill: "
            f"{slots}, all {len(self._setup.all_cores)} for a lane that is alone"
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def slots(self) -> tuple[Slot, ...]:
        every = len(self._setup.all_cores)
        return tuple(Slot(every - len(cores), len(cores)) for cores in self._setup.slot_cores)

    @property
    def ready(self) -> bool:
        return self._ready

    @property
    def busy(self) -> bool:
        return bool(self._in_flight)

    def jobs(self) -> list[str]:
        return list(self._in_flight)

    def wait_until_ready(self) -> None:
        """Raises `LaneError` when the process ends, or takes too long."""
        try:
            if self._connection.poll(START_TIMEOUT_S):
                self._connection.recv()
                self._ready = True
                return
            why = f"it was not ready within {START_TIMEOUT_S:.0f} s"
        except (EOFError, OSError):
            why = f"it ended with exit code {self._process.wait()}"
        self.close()
        raise LaneError(f"the prefill lane did not start: {why}; its words stand above in the log")

    def alive(self) -> bool:
        return self._process.poll() is None

    def submit(self, job: Job) -> None:
        if not self._in_flight:
            self._submitted = time.monotonic()
        self._in_flight.add(job.request_id)
        self._send(("job", job))

    def cancel(self, request_id: str) -> None:
        if request_id in self._in_flight:
            self._send(("cancel", request_id))

    def begin_step(self, computes: bool, slot: int) -> None:
        self._board["decoding"] = float(computes)
        self._board["slot"] = slot
        if not computes:
            return
        if not self._ready:
            self.poll()
        # A lane that loads its model has its cores already, or its start would be felt by every stream.
        working = self.busy or (not self._ready and self.alive())
        decode = len(self._setup.all_cores) - len(self._setup.slot_cores[slot if self._ready else -1])
        self._cores.take(self._setup.all_cores[:decode] if working else self._setup.all_cores)

    def launch(self) -> None:
        """Nothing: the process began when it got the job."""

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it died: the next poll says so
            self._connection.send(message)

    def poll(self, patience_s: float = 0.0) -> list[Outcome]:
        outcomes: list[Outcome] = []
        kind = ""
        try:
            while self._connection.poll(0.0 if outcomes else patience_s):
                kind, request_id, error = self._connection.recv()
                self._ready |= kind == "ready"
                if request_id in self._in_flight:
                    self._in_flight.discard(request_id)
                    outcomes.append(Outcome(request_id, error if kind == "failed" else None))
                if kind == "failed":
                    break
            if kind == "failed" or self._hangs():
                self._process.kill()
                raise EOFError
        except (EOFError, OSError):
            code = self._process.wait()
            outcomes += [Outcome(one, f"the lane's process ended with exit code {code}") for one in self._in_flight]
            self._in_flight.clear()
        return outcomes

    def _hangs(self) -> bool:
        last = max(self._board["beat"], self._submitted)
        return self.busy and self._ready and time.monotonic() - last > CHUNK_TIMEOUT_S

    def report(self) -> LaneReport | None:
        slots = self.slots if self._ready and not self._said_slots else ()
        self._said_slots |= self._ready
        (tokens, seconds), (before, time_before) = (self._board["tokens"], self._board["seconds"]), self._reported
        if seconds <= time_before:
            return LaneReport(slots) if slots else None
        self._reported = tokens, seconds
        return LaneReport(slots, int(tokens - before), seconds - time_before)

    def close(self) -> None:
        self._connection.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._board.close()
        self._cores.take(self._setup.all_cores)


class ProcessLanes:
    """Makes the lanes of one worker, the first and those that follow one that died: over one KV cache, on the same cores.

    Args:
        options: length of chunks, and the user's own split of the cores.
        vllm_config: the worker's.
        kv_cache_config: the worker's.
    """

    def __init__(self, options: AgentServeConfig, vllm_config: Any, kv_cache_config: Any) -> None:
        self.memory = KvMemory()
        self._options = options
        self._configs = vllm_config, kv_cache_config
        self._cores: Cores | None = None

    def start(self) -> ProcessLane:
        """Starts a lane and waits for it; raises `LaneError`."""
        lane = self.restart()
        lane.wait_until_ready()
        return lane

    def restart(self) -> ProcessLane:
        """Starts one without waiting."""
        every = cpu.worker_cores()
        memory = self.memory.memory
        if memory is None:
            raise LaneError("vLLM has not allocated its KV cache in the memory that the lane shares")
        vllm_config, kv_cache_config = self._configs
        setup = Setup(
            vllm_config=cpu.second_worker_config(vllm_config),
            kv_cache_config=kv_cache_config,
            memory=(memory.size, memory.descriptor),
            chunk_tokens=self._options.lane_chunk_tokens or CHUNK_TOKENS,
            slot_cores=tuple(every[decode:] for decode in core_ladder(len(every), self._options.lane_decode_share)),
            all_cores=every,
        )
        if self._cores is None:
            self._cores = Cores()
        return ProcessLane(setup, self._cores)


def resident_mib(pid: int) -> int:
    """Memory of a process that it shares with nobody, in MiB; 0 when it is gone."""
    with contextlib.suppress(OSError):
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) // 1024 if found else 0
    return 0


def lane_environment(threads: int) -> dict[str, str]:
    """Ours without vLLM's pinning of threads: the lane moves between core sets."""
    pinning = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")
    environment = {name: value for name, value in os.environ.items() if name not in pinning}
    return environment | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
