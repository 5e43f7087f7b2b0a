"""Token sequences without a tokenizer, and the hashes of their blocks without vLLM."""

import random
from collections.abc import Sequence

BLOCK = 16


def hashes(tokens: Sequence[int], block: int = BLOCK) -> list[int]:
    """As vLLM's: every full block's hash covers all blocks before it."""
    found: list[int] = []
    for begin in range(0, len(tokens) - block + 1, block):
        found.append(hash((found[-1] if found else None, tuple(tokens[begin : begin + block]))))
    return found


def tokens_of(name: str, count: int) -> list[int]:
    """So many tokens; the same ones for the same name."""
    return random.Random(name).choices(range(100, 4000), k=count)
