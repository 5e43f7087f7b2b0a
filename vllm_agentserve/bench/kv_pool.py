"""The size of the KV cache of every server of ours, from what the user asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_agentserve.bench.program_traffic import BLOCK_OPTION, option_value
from vllm_agentserve.bench.sessions import WorkloadError

CPU_KV_GIB = 2.0
CPU_BLOCK_TOKENS, GPU_BLOCK_TOKENS = 128, 16
"""Tokens per KV block that vLLM chooses by itself; given to it where the size of the cache depends on it."""


def kv_bytes(gib: float | None, gpu: bool) -> int | None:
    """Size of the KV cache; None where a first start has to find it."""
    gib = gib if gib is not None or gpu else CPU_KV_GIB
    return None if gib is None else int(gib * 2**30)


@dataclass(frozen=True)
class AnyPool:
    """A KV cache of whatever size, where no number of tokens was asked for; answers like `KvPool`."""

    options: tuple[str, ...] = ()

    def fitting(self, context_tokens: int) -> int:
        return context_tokens

    def mismatch(self, stated_tokens: int | None) -> str:
        return ""

    def check(self, context_tokens: int) -> None:
        pass


ANY_POOL = AnyPool()


@dataclass(frozen=True)
class KvPool:
    """A KV cache of a size that was asked for."""

    blocks: int
    block_tokens: int

    @property
    def tokens(self) -> int:
        """What the server states."""
        return self.blocks * self.block_tokens

    @property
    def room(self) -> int:
        """Tokens of the longest context: vLLM keeps one block for itself."""
        return self.tokens - self.block_tokens

    @property
    def options(self) -> tuple[str, ...]:
        """Options of `vllm serve` for it."""
        return (BLOCK_OPTION, str(self.block_tokens), "--num-gpu-blocks-override", str(self.blocks))

    def fitting(self, context_tokens: int) -> int:
        """What of so long a context fits, in tokens."""
        return min(context_tokens, self.room)

    def mismatch(self, stated_tokens: int | None) -> str:
        """In words, what a server states that has another KV cache; "" if it has this one. None: it states nothing."""
        return "" if stated_tokens == self.tokens else f"a KV cache of {stated_tokens} tokens, not {self.tokens}"

    def check(self, context_tokens: int) -> None:
        """Raises `WorkloadError` when one context alone does not fit."""
        if self.room < context_tokens:
            raise WorkloadError(
                f"--kv-tokens {self.tokens} has room for one context of {self.room} tokens, the longest needs "
                f"{context_tokens}: give more"
            )


def pool_of(tokens: int, serve: Sequence[str], gpu: bool) -> KvPool:
    """A pool of so many tokens, rounded up to whole blocks.

    Raises:
        WorkloadError: the block size in `serve` is no whole number.
    """
    block = int(option_value(serve, BLOCK_OPTION, str(GPU_BLOCK_TOKENS if gpu else CPU_BLOCK_TOKENS)))
    return KvPool(-(-tokens // block), block)
