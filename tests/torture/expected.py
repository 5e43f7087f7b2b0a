"""What a KV block has to hold, by the hash that vLLM gives to the tokens of its prefix."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.torture.reference import Reference


class Expected:
    """What blocks have to hold, by hash: a hash stands for all tokens up to the end of its block.

    Args:
        write: puts KV of `Reference` into blocks as vLLM lays them out; what is not written is not a number.
    """

    def __init__(self, reference: Reference, block_size: int, write: Callable[[Tensor], Tensor]) -> None:
        self.reference = reference
        self.block_size = block_size
        self._write = write
        self._prefix: dict[bytes, tuple[bytes | None, list[int], int]] = {}
        self._kv: dict[bytes, Tensor] = {}
        self._blocks: dict[bytes, Tensor] = {}

    def learn(self, request: Any) -> None:
        """Takes in which tokens the hashes of a request of vLLM stand for."""
        hashes, size = request.block_hashes, self.block_size
        for number in range(len(hashes) - 1, -1, -1):
            if hashes[number] in self._prefix:
                break
            tokens = list(request.all_token_ids[number * size : (number + 1) * size])
            self._prefix[hashes[number]] = hashes[number - 1] if number else None, tokens, number

    def depth(self, name: bytes) -> int | None:
        """How many blocks are before this one; None when no request has had it."""
        found = self._prefix.get(name)
        return found[2] if found is not None else None

    def past(self, name: bytes | None) -> Tensor:
        """KV of all tokens up to the end of a block."""
        known, missing = [], []
        while name is not None:
            parent, tokens, _ = self._prefix[name]
            if name in self._kv:
                known.append(self._kv[name])
            else:
                missing.append((name, tokens))
            name = parent
        past = torch.cat([self.reference.empty(), *reversed(known)], dim=2)
        if missing:
            missing.reverse()
            made, _ = self.reference.extend(past, [token for _, tokens in missing for token in tokens])
            for (name, _), kv in zip(missing, made.split(self.block_size, dim=2), strict=True):
                self._kv[name] = kv
            past = torch.cat([past, made], dim=2)
        return past

    def block(self, name: bytes) -> Tensor:
        """Shape (layers, KV heads, block size, 2 x head size)."""
        if name not in self._blocks:
            if name not in self._kv:
                self.past(name)
            self._blocks[name] = self._write(self._kv[name])
        return self._blocks[name]

    def begun(self, before: bytes | None, tokens: list[int]) -> Tensor:
        """A block that holds so many tokens only."""
        return self._write(self.reference.extend(self.past(before), tokens)[0])
