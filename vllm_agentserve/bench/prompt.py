"""A prompt that grows from turn to turn, ready to be sent."""

import asyncio
import hashlib
from array import array
from collections.abc import Sequence

import msgspec

PIECE_TOKENS = 4096
"""Tokens that are prepared at a time; in between, other streams of the client are read."""


class GrowingPrompt:
    """Token ids as the JSON that goes over the wire, and their digest (see `records.digest`); only what is new is computed.

    A prompt of 200,000 tokens takes some 20 ms to write and to digest. Done at once, tokens of all other streams would be
    stamped as late as that.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._json = bytearray()
        self._digest = hashlib.sha256()

    async def extend(self, token_ids: Sequence[int]) -> None:
        """Appends token ids, piece by piece."""
        for begin in range(0, len(token_ids), PIECE_TOKENS):
            if begin:
                await asyncio.sleep(0)
            piece = token_ids[begin : begin + PIECE_TOKENS]
            self._json += (b"," if self.tokens else b"") + msgspec.json.encode(piece)[1:-1]
            self._digest.update(array("i", piece).tobytes())
            self.tokens += len(piece)

    def copy(self) -> "GrowingPrompt":
        other = GrowingPrompt()
        other.tokens, other._json, other._digest = self.tokens, bytearray(self._json), self._digest.copy()
        return other

    @property
    def json(self) -> msgspec.Raw:
        """The list of token ids as JSON."""
        return msgspec.Raw(b"[" + self._json + b"]")

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()[:12]
