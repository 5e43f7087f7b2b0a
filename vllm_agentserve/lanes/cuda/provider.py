"""CUDA: what makes the lane of a worker: the ladder, the second model runner, and a trial that both fit into memory."""

from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.lanes.cuda.chunk_in_flight import settled
from vllm_agentserve.lanes.cuda.green import GreenLadder
from vllm_agentserve.lanes.cuda.relay import Relay
from vllm_agentserve.lanes.cuda.stream import StreamLane
from vllm_agentserve.policy.reserve import CHUNK_TOKENS, DECODE_SHARES, LONGEST_CHUNKS
from vllm_agentserve.policy.slots import chunk_length
from vllm_agentserve.vllm_compat import LaneError, cuda
from vllm_agentserve.vllm_compat.cuda_launch import ForwardState, launching_thread
from vllm_agentserve.vllm_compat.cuda_memory import LaneMemory
from vllm_agentserve.vllm_compat.cuda_runner import LaneModelRunner

logger = init_logger("vllm.agentserve")


class StreamLaneProvider:
    """Makes the lane of a GPU worker, once: it shares the device with the steps, so none is made while the engine serves.

    Args:
        options: shares and lengths the user has set.
        vllm_config: the worker's.
        kv_cache_config: the worker's.
    """

    def __init__(self, options: AgentServeConfig, vllm_config: Any, kv_cache_config: Any) -> None:
        self._options = options
        self._configs = vllm_config, kv_cache_config

    @property
    def restarts(self) -> bool:
        return False

    def kv_cache_memory(self) -> None:
        """The lane is in the worker's process and sees its tensors."""

    def start(self, begin: Callable[[Any], None]) -> StreamLane:
        """As `LaneProvider.start`; vLLM's own runner has its model and KV cache, and has captured no CUDA graphs yet."""
        return stream_lane(self._options, *self._configs, begin)

    def restart(self) -> StreamLane:
        raise LaneError("a prefill lane on a GPU is not made while the engine serves")


def stream_lane(
    options: AgentServeConfig, vllm_config: Any, kv_cache_config: Any, begin: Callable[[Any], None]
) -> StreamLane:
    """Makes the lane on the worker's device, and computes a chunk of every size once, on the streams it will run on.

    Raises:
        LaneError: something stands against it, or the memory does not suffice; nothing is left behind.
    """
    import torch

    refuse(cuda.cuda_obstacle(vllm_config))
    main = cuda.worker_runner()
    refuse(cuda.runner_obstacle(main))
    device = torch.cuda.current_device()
    share = options.lane_decode_share
    shares = DECODE_SHARES if share is None else (share,)
    memory = LaneMemory(torch.cuda)
    memory.begin()
    ladder = GreenLadder(
        cuda.cuda_driver(), device, shares, lambda handle: torch.cuda.ExternalStream(handle, device=device)
    )
    relay = Relay(ForwardState(), lambda: launching_thread(device))
    runner: LaneModelRunner | None = None
    try:
        base = options.lane_chunk_tokens or CHUNK_TOKENS
        # A job never fills the context, and the lane leaves its last token to the decode lane.
        most = min(LONGEST_CHUNKS * base, main.max_num_tokens, main.max_model_len - 1)
        runner = LaneModelRunner(main, vllm_config, kv_cache_config, options.lane_max_requests + 1, most, relay)
        runner.capture_for([streams.decode for streams in ladder.streams], options.lane_cudagraph_tokens, memory.taking)
        alone = torch.cuda.Stream(device)
        slots = ladder.slots
        smallest = min(slot.prefill for slot in slots)
        lengths = [chunk_length(base, slot.prefill, smallest) for slot in slots] + [most]
        streams = {f"prefill {slot}": streams.prefill for slot, streams in enumerate(ladder.streams)} | {"alone": alone}
        torch.cuda.synchronize()
        for (name, stream), length in zip(streams.items(), lengths, strict=True):
            with torch.cuda.stream(stream):
                runner.warm_up(min(length, most))
            memory.chunk_seen(name, stream)
        memory.chunks_ended()
    except BaseException as error:
        if settled(torch.cuda):
            if runner is not None:
                runner.close()
            else:
                relay.close()
            ladder.close()
        if not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise LaneError(
            f"the second model runner does not fit into the memory that is left: lower --gpu-memory-utilization or "
            f"'lane_chunk_tokens' ({error})"
        ) from error
    if ladder.own_queues:
        logger.info("agentserve: the decode lane and the prefill lane have hardware queues of their own.")
    else:
        logger.info(
            "agentserve: the decode lane and the prefill lane share hardware queues and may wait for each other there; queues "
            "of their own need CUDA 13.1 in driver and cuda-bindings."
        )
    lane = StreamLane(runner, ladder, alone, base, most, torch.cuda, begin, memory)
    runner.lead(lane.step, lane.step_goes_on)
    return lane


def refuse(obstacle: str | None) -> None:
    """Raises `LaneError` when there is one."""
    if obstacle is not None:
        raise LaneError(f"two lanes cannot run on this worker: {obstacle}")
