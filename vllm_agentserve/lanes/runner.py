"""The lane's own process: vLLM's CPU worker over the KV cache of another one. It computes prompts and samples nothing.

python -m vllm_agentserve.lanes.runner DESCRIPTOR PARENT   # a connection to the worker, and its process; never by hand
"""

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from vllm_agentserve import vllm_compat
from vllm_agentserve.lanes.cores import Cores
from vllm_agentserve.lanes.lane import Job
from vllm_agentserve.lanes.memory import KvMemory, SharedMemory

PR_SET_PDEATHSIG = 1
DECODED, BEAT = 0, 1
"""Places in the shared board, in monotonic seconds: when the decode lane last began a step, and the lane a chunk."""
DECODE_GONE_S = 0.02
"""The lane takes all cores when no decode step began for so long: between two steps decode is not gone."""
BOARD_BYTES = 2 * 8


@dataclass(frozen=True)
class Setup:
    """What the worker tells the lane at start."""

    vllm_config: Any
    kv_cache_config: Any
    memory: tuple[int, int]
    """Size and descriptor of the KV cache."""
    chunk_tokens: int
    own_cores: list[int]
    all_cores: list[int]
    board: int = -1
    """Descriptor of the board, which is made with the process."""


class LaneRunner:
    """Computes jobs in the order they came, chunk by chunk."""

    def __init__(self, setup: Setup) -> None:
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        self.chunk_tokens = setup.chunk_tokens
        self.board = SharedMemory(BOARD_BYTES, setup.board).tensor(torch.float64)
        self.cores = Cores(setup.own_cores, setup.all_cores, process=True)
        self.jobs: dict[str, Job] = {}
        self.position: dict[str, int] = {}
        self._finished: set[str] = set()
        wrapper = WorkerWrapperBase()
        with tempfile.TemporaryDirectory(prefix="agentserve-lane-") as folder:
            arguments = {
                "vllm_config": setup.vllm_config,
                "local_rank": 0,
                "rank": 0,
                "distributed_init_method": f"file://{folder}/rendezvous",
                "is_driver_worker": True,
            }
            wrapper.init_worker([arguments])
            wrapper.init_device()
        worker = wrapper.worker
        worker.load_model()
        with KvMemory(SharedMemory(*setup.memory)).allocation():
            worker.initialize_from_config(setup.kv_cache_config)
        self._model_runner = worker.model_runner

    def step(self) -> str | None:
        """Computes one chunk of the first job; returns the id of a job that is through."""
        request_id, job = next(iter(self.jobs.items()))
        position = self.position.get(request_id, job.start)
        tokens = min(self.chunk_tokens, job.end - position)
        now = self.board[BEAT] = time.monotonic()
        self.cores.take(alone=now - float(self.board[DECODED]) > DECODE_GONE_S)
        vllm_compat.compute_only(self._model_runner, self._chunk(job, position, tokens))
        self.position[request_id] = position + tokens
        if position + tokens < job.end:
            return None
        self.forget(request_id)
        return request_id

    def _chunk(self, job: Job, position: int, tokens: int) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

        output = SchedulerOutput.make_empty()
        if job.request_id in self.position:
            output.scheduled_cached_reqs = CachedRequestData(
                req_ids=[job.request_id],
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},
                new_block_ids=[None],
                num_computed_tokens=[position],
                num_output_tokens=[0],
            )
        else:
            output.scheduled_new_reqs = [
                NewRequestData(
                    req_id=job.request_id,
                    prompt_token_ids=job.token_ids,
                    mm_features=[],
                    sampling_params=SamplingParams(),
                    pooling_params=None,
                    block_ids=job.block_ids,
                    num_computed_tokens=position,
                    lora_request=None,
                )
            ]
        finished, self._finished = self._finished, set()
        return replace(
            output,
            num_scheduled_tokens={job.request_id: tokens},
            total_num_scheduled_tokens=tokens,
            finished_req_ids=finished,
        )

    def forget(self, request_id: str) -> None:
        """Drops a job, begun or not."""
        if self.jobs.pop(request_id, None) is not None and self.position.pop(request_id, None) is not None:
            self._finished.add(request_id)


def serve(connection: Connection) -> None:
    """Answers every job with ("done", id, None) or ("failed", id, why), cancelled ones too, until told to end."""
    setup: Setup = connection.recv()
    lane = LaneRunner(setup)
    connection.send(("ready", None, None))
    while True:
        while connection.poll(0 if lane.jobs else None):
            kind, value = connection.recv()
            if kind == "job":
                lane.jobs[value.request_id] = value
            elif value in lane.jobs:
                lane.forget(value)
                connection.send(("done", value, None))
        first = next(iter(lane.jobs))
        try:
            done = lane.step()
        except Exception:
            lane.forget(first)
            connection.send(("failed", first, traceback.format_exc()))
            continue
        if done is not None:
            connection.send(("done", done, None))


def main() -> None:
    # The worker may be killed without a chance to say so; and Ctrl-C reaches the whole group, but is its business.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):
        return  # it was killed before we asked
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
