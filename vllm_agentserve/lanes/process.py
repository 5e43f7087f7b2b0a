"""The prefill lane of a CPU worker: a process of its own, since two model runners in one process share C++ scratch memory."""

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import Pipe
from typing import Any

import torch

from vllm_agentserve.lanes.lane import Job, Outcome
from vllm_agentserve.lanes.memory import SharedMemory
from vllm_agentserve.lanes.runner import BEAT, BOARD_BYTES, DECODED, Setup

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 5.0
CHUNK_TIMEOUT_S = 60.0
"""A lane that has begun no chunk for so long while it has jobs hangs, and is ended."""


class LaneError(RuntimeError):
    """The lane's process did not start."""


class ProcessLane:
    """The lane as the worker sees it; `LaneRunner` is the other end. No call blocks the decode steps.

    Args:
        setup: what the process is told; its `board` is made here.
    """

    def __init__(self, setup: Setup) -> None:
        self._board_memory = SharedMemory(BOARD_BYTES)
        self._board = self._board_memory.tensor(torch.float64)
        self._in_flight: set[str] = set()
        self._ready = False
        self._submitted = time.monotonic()
        self._connection, theirs = Pipe()
        inherited = (theirs.fileno(), setup.memory[1], self._board_memory.descriptor)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_agentserve.lanes.runner", str(theirs.fileno()), str(os.getpid())],
            pass_fds=inherited,
            stdin=subprocess.DEVNULL,
            env=lane_environment(len(setup.all_cores)),
        )
        theirs.close()
        self._send(replace(setup, board=self._board_memory.descriptor))

    @property
    def busy(self) -> bool:
        return bool(self._in_flight)

    @property
    def pid(self) -> int:
        return self._process.pid

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

    def decodes(self) -> None:
        """Tells the lane that a decode step begins, which decides how many cores it takes."""
        self._board[DECODED] = time.monotonic()

    def submit(self, job: Job) -> None:
        if not self._in_flight:
            self._submitted = time.monotonic()
        self._in_flight.add(job.request_id)
        self._send(("job", job))

    def cancel(self, request_id: str) -> None:
        if request_id in self._in_flight:
            self._send(("cancel", request_id))

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it died: the next poll says so
            self._connection.send(message)

    def poll(self, patience_s: float = 0.0) -> list[Outcome]:
        """The jobs that ended since the last call; when the process is gone, all of them, failed."""
        outcomes: list[Outcome] = []
        try:
            while self._connection.poll(0.0 if outcomes else patience_s):
                kind, request_id, error = self._connection.recv()
                self._ready |= kind == "ready"
                if request_id in self._in_flight:
                    self._in_flight.discard(request_id)
                    outcomes.append(Outcome(request_id, error if kind == "failed" else None))
            if self._hangs():
                self._process.kill()
                raise EOFError
        except (EOFError, OSError):
            code = self._process.wait()
            outcomes += [Outcome(one, f"the lane's process ended with exit code {code}") for one in self._in_flight]
            self._in_flight.clear()
        return outcomes

    def _hangs(self) -> bool:
        last = max(float(self._board[BEAT]), self._submitted)
        return self.busy and self._ready and time.monotonic() - last > CHUNK_TIMEOUT_S

    def close(self) -> None:
        """Ends the process; returns when it is gone."""
        self._connection.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def lane_environment(threads: int) -> dict[str, str]:
    """Ours without vLLM's pinning of threads: the lane moves between core sets."""
    pinning = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")
    environment = {name: value for name, value in os.environ.items() if name not in pinning}
    return environment | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
