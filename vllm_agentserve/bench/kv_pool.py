"""The size of the KV cache of every server of ours, from what the user asked for."""

from collections.abc import Sequence

from vllm_agentserve.bench.program_traffic import BLOCK_OPTION, option_value
from vllm_agentserve.bench.sessions import WorkloadError

CPU_KV_GIB = 2.0
CPU_BLOCK_TOKENS, GPU_BLOCK_TOKENS = 128, 16
"""Tokens per KV block that vLLM chooses by itself; given to it where the size of the cache depends on it."""


def kv_bytes(gib: float | None, gpu: bool) -> int | None:
    """Size of the KV cache; None where a first start has to find it."""
    gib = gib if gib is not None or gpu else CPU_KV_GIB
    return None if gib is None else int(gib * 2**30)


def pool_options(tokens: int, serve: Sequence[str], gpu: bool) -> tuple[tuple[str, ...], int]:
    """Options of `vllm serve` for a KV cache of so many tokens, rounded up to whole blocks, and that size.

    vLLM keeps one of the blocks for itself.

    Raises:
        WorkloadError: the block size in `serve` is no whole number.
    """
    block = int(option_value(serve, BLOCK_OPTION, str(GPU_BLOCK_TOKENS if gpu else CPU_BLOCK_TOKENS)))
    blocks = -(-tokens // block)
    return (BLOCK_OPTION, str(block), "--num-gpu-blocks-override", str(blocks)), blocks * block


def check_pool(tokens: int, context_tokens: int) -> None:
    """Raises `WorkloadError` when one context alone does not fit."""
    if tokens < context_tokens:
        raise WorkloadError(
            f"a KV cache of {tokens} tokens holds not even one context, which needs {context_tokens}: give more --kv-tokens"
        )
