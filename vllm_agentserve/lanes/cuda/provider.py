"""CUDA: what the stream lane of a worker is made of: the ladder, the second model runner, and a proof that both fit."""

from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

from vllm_agentserve.lanes.cuda.chunk_in_flight import settled
from vllm_agentserve.lanes.cuda.green import GreenLadder
from vllm_agentserve.lanes.cuda.relay import Relay
from vllm_agentserve.policy.reserve import CHUNK_TOKENS, DECODE_SHARES, LONGEST_CHUNKS, MIB
from vllm_agentserve.policy.slots import chunk_length
from vllm_agentserve.vllm_compat import LaneError, cuda
from vllm_agentserve.vllm_compat.cuda_launch import ForwardState, launching_thread
from vllm_agentserve.vllm_compat.cuda_memory import LaneMemory
from vllm_agentserve.vllm_compat.cuda_runner import LaneModelRunner

logger = init_logger("vllm.agentserve")


@dataclass(frozen=True)
class LaneParts:
    """Arguments of `StreamLane`, and the memory they were seen to take."""

    runner: LaneModelRunner
    ladder: GreenLadder
    alone: Any
    base: int
    most: int
    cuda: Any
    memory: LaneMemory

    def warmed_up(self, reserved: int, step: int) -> None:
        """vLLM's own warm-up is over, its CUDA graphs and those of the slots are captured.

        Args:
            reserved: bytes that were kept free for the lane, 0 where the user has set the size of the KV cache.
            step: bytes of the temporaries of vLLM's largest step, 0 likewise.

        Raises:
            LaneError: what is left on the device does not suffice for service.
        """
        self.runner.warm_steps()
        self.memory.refuse(step)
        logger.info(
            "agentserve: the prefill lane took %s in warm-up; %.0f MiB were kept free for it.",
            self.memory,
            reserved / MIB,
        )


def lane_parts(options: Any, vllm_config: Any, kv_cache_config: Any) -> LaneParts:
    """Makes them on the worker's device, and computes a chunk of every size once, on the streams it will run on.

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
    return LaneParts(runner, ladder, alone, base, most, torch.cuda, memory)


def refuse(obstacle: str | None) -> None:
    """Raises `LaneError` when there is one."""
    if obstacle is not None:
        raise LaneError(f"two lanes cannot run on this worker: {obstacle}")
