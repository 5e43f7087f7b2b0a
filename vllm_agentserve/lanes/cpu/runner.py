"""The lane's own process: vLLM's CPU worker over the KV cache of another one. It computes prompts and samples nothing.

python -m vllm_agentserve.lanes.cpu.runner DESCRIPTOR PARENT   # a socket to the worker, and its process; never by hand
"""

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_agentserve.lanes.cpu.channel import Channel
from vllm_agentserve.lanes.cpu.cores import Cores, move
from vllm_agentserve.lanes.cpu.memory import KvMemory, SharedMemory
from vllm_agentserve.lanes.cpu.shared_counters import SharedCounters
from vllm_agentserve.policy.jobs import ChunkQueue
from vllm_agentserve.policy.slots import chunk_length
from vllm_agentserve.processes.child import end_with_parent
from vllm_agentserve.vllm_compat.cpu import SecondWorker

OOM_SCORE = 500
"""Of 1000: when memory runs out the kernel is to end the lane, whose prompts are computed again, and not the engine."""


@dataclass(frozen=True)
class Setup:
    """What the worker sends to the lane's process at its start."""

    vllm_config: Any
    kv_cache_config: Any
    memory: tuple[int, int]
    """Size and descriptor of the KV cache."""
    chunk_tokens: int
    most_tokens: int
    """The longest chunk."""
    slot_cores: tuple[list[int], ...]
    """The lane's cores on every slot."""
    all_cores: list[int]
    load_cores: list[int]
    """Where it loads and compiles: off the decode lane's cores when there is one."""
    warm_up_s: float = 0.0
    """After so much warm-up no further chunk is computed for it."""
    counters: int = -1
    """Descriptor of the shared counters, which are made with the process."""


class LaneRunner:
    """Computes jobs chunk by chunk, in the order the policy decides between two chunks."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.counters = SharedCounters(setup.counters)
        self.cores = Cores(process=True)
        self.jobs = ChunkQueue()
        self._smallest = min(len(cores) for cores in setup.slot_cores)
        self._beside = 0
        """Chunks computed beside decodes."""
        memory = KvMemory(SharedMemory(*setup.memory))
        self._worker = SecondWorker(setup.vllm_config, setup.kv_cache_config, memory.allocation())

    def warm_up(self) -> float:
        """Compiles the model; returns how many seconds the longest chunk of the smallest slot then takes, on its cores. Then it
        computes the longest chunk of each slot, so that kernel libraries are ready for them."""
        setup = self.setup
        smallest = min(setup.slot_cores, key=len)
        tokens = min(setup.chunk_tokens, setup.most_tokens)
        began = time.monotonic()
        self._worker.warm_up(tokens)
        self.cores.take(smallest)
        took = self._worker.warm_up(tokens)
        for own in setup.slot_cores:
            longest = min(chunk_length(setup.chunk_tokens, len(own), self._smallest), setup.most_tokens)
            # On all cores first, see `policy.step_sizes.KernelSizes`. A lane that starts while requests are served stays off the
            # cores of the decode lane.
            for cores in (setup.all_cores, own) if setup.load_cores == setup.all_cores else (own,):
                if time.monotonic() - began < setup.warm_up_s and (cores, longest) != (smallest, tokens):
                    self.cores.take(cores)
                    self._worker.warm_up(longest)
        return took

    def step(self) -> str | None:
        """Computes one chunk; returns the id of its job if that has ended. Raises `ChunkError`."""
        setup, counters = self.setup, self.counters
        began = time.monotonic()
        counters["beat"] = began
        alone = not counters["decoding"]
        own = setup.slot_cores[int(counters["slot"])]
        self.cores.take(setup.all_cores if alone else own)
        # Not longer when the lane is alone: a decode step that comes meanwhile would find its cores taken until the chunk ends.
        chunk = self.jobs.take(min(chunk_length(setup.chunk_tokens, len(own), self._smallest), setup.most_tokens))
        request_id = chunk.job.request_id
        try:
            self._worker.compute(chunk)
        except Exception as error:
            raise ChunkError(request_id) from error
        if not alone:
            self._beside += 1
            if self._beside > 1:  # in the first one libraries prepare themselves
                counters["tokens"] += chunk.tokens
                counters["seconds"] += time.monotonic() - began
        if not chunk.last:
            return None
        self.forget(request_id)
        return request_id

    def forget(self, request_id: str) -> None:
        """Drops a job, begun or not."""
        if self.jobs.drop(request_id):
            self._worker.forget(request_id)


class ChunkError(RuntimeError):
    """A chunk failed; its only argument is the id of the job."""


def serve(channel: Channel) -> None:
    """Sends ("ready", None, seconds of a chunk), answers every job with ("done", id, None), also when it was cancelled, until
    told to end; ends after ("failed", id, error)."""
    messages = channel.receive(None)
    setup: Setup = messages.pop(0)
    move(0, setup.load_cores)
    lane = LaneRunner(setup)
    channel.send(("ready", None, lane.warm_up()))
    while True:
        messages += channel.receive(0.0 if len(lane.jobs) or messages else None)
        for kind, value in messages:
            if kind == "job":
                lane.jobs.add(value)
            elif value in lane.jobs:
                lane.forget(value)
                channel.send(("done", value, None))
        messages = []
        if not len(lane.jobs):
            continue
        try:
            done = lane.step()
        except ChunkError as error:
            channel.send(("failed", error.args[0], traceback.format_exc()))
            # What vLLM's runner keeps between steps is in no known state now: the worker starts another process.
            raise
        if done is not None:
            channel.send(("done", done, None))


def main() -> None:
    # The worker may be killed, and then sends nothing. The thread that started us waits for our end, so it ends with its process
    # only. Ctrl-C reaches the whole group, and is the worker's to handle.
    end_with_parent()
    if os.getppid() != int(sys.argv[2]):
        return  # it was killed before we asked
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(Channel(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
