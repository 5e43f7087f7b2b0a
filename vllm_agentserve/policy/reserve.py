"""GPU memory that a prefill lane needs beside the KV cache, before there is a lane to look at."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_agentserve.policy.slots import chunk_length

MIB = 1 << 20
DECODE_SHARES = (0.25, 0.5, 0.75)
"""Parts of a GPU that the decode lane gets. Few: every slot costs start-up time, streams and a set of CUDA graphs."""
CHUNK_TOKENS = 1024
"""Default of `lane_chunk_tokens` on a GPU: a chunk is launched kernel by kernel, which only a long one pays back."""
LONGEST_CHUNKS = 8
"""A chunk on the whole device has so many times that many tokens at most."""
CONTEXT_BYTES = 16 * MIB
"""What the driver is taken to need for a green context; our assumption, start-up measures it."""
BUFFER_BYTES = 64 * MIB
"""What the second model runner is taken to keep for its inputs and requests; our assumption, start-up measures it."""
LOGITS = 3
"""Copies of the logits, in float32, that sampling holds at once."""


@dataclass(frozen=True)
class Reserve:
    """Bytes, by what they are for.

    Args:
        chunks: temporaries of chunks, on the stream of every prefill slot and on that of a lane that is alone.
        steps: temporaries of decode steps, on the stream of every decode slot.
        workspaces: what cuBLAS keeps on each of these streams.
        graphs: a set of CUDA graphs for every decode slot.
        contexts: what the driver keeps for green contexts.
        buffers: what the second model runner keeps.
    """

    chunks: int = 0
    steps: int = 0
    workspaces: int = 0
    graphs: int = 0
    contexts: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        return self.chunks + self.steps + self.workspaces + self.graphs + self.contexts + self.buffers


def workspace_bytes(major: int) -> int:
    """What torch lets cuBLAS keep on a stream, by compute capability: 32 MiB from 9.0 on, else 8.125 MiB."""
    return 32 * MIB if major >= 9 else 8 * MIB + 128 * 1024


def lane_reserve(
    activation: int,
    step_tokens: int,
    context_tokens: int,
    base: int,
    shares: Sequence[float],
    graph_tokens: int,
    graph_set: int,
    vocabulary: int,
    major: int,
) -> Reserve:
    """What the lane is going to take. torch caches the temporaries of every stream for that stream, so those of all count.

    A step larger than `graph_tokens` on a slot takes more than is counted here: torch then empties the caches of other streams,
    which waits for the device.

    Args:
        activation: bytes at the peak of the forward pass of a step of `step_tokens`, the most there may be. Sampling is not in
            it: chunks never sample.
        context_tokens: of the model.
        base: tokens of a chunk on the smallest prefill slot.
        shares: of the decode lane, a slot each.
        graph_tokens: decode batches up to this have CUDA graphs on the slots.
        graph_set: bytes of a set of these graphs.
        vocabulary: size of a row of logits.
        major: compute capability.
    """
    longest = min(LONGEST_CHUNKS * base, step_tokens, context_tokens)
    units = [round(1000 * (1.0 - share)) for share in shares]
    lengths = [min(chunk_length(base, unit, min(units)), longest) for unit in units]
    decodes = min(graph_tokens, step_tokens)
    per_step = activation * decodes // step_tokens + LOGITS * 4 * vocabulary * decodes
    return Reserve(
        chunks=activation * (sum(lengths) + longest) // step_tokens,
        steps=per_step * len(shares),
        workspaces=workspace_bytes(major) * (2 * len(shares) + 1),
        graphs=graph_set * len(shares),
        contexts=CONTEXT_BYTES * 2 * len(shares),
        buffers=BUFFER_BYTES,
    )


def shortfall(free: int, needed: int) -> str | None:
    """Why the lane would run out of memory, and what to do; None if it would not.

    Args:
        free: bytes of the device that nobody holds.
        needed: bytes that the lane was seen to hold at its peak and will take again.
    """
    if free >= needed:
        return None
    return (
        f"{free / MIB:.0f} MiB are left on the device, and the prefill lane took {needed / MIB:.0f} MiB for its streams in "
        "warm-up, which it takes again in service: lower --gpu-memory-utilization (or --kv-cache-memory, if it is given) by at "
        f"least {(needed - free) / MIB:.0f} MiB, lower 'lane_chunk_tokens', or use mode 'time-sliced'"
    )
