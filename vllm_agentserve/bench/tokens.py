"""Token ids of prompts: drawn at once, or made when they are read."""

import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import overload

TOKEN_IDS = (100, 4000)
"""Prompts are drawn from these ids, low included, high not: ordinary tokens of every vocabulary of 4096 and more."""
OWN_TOKENS = 512
"""Tokens beyond the named blocks of a recorded prompt are drawn this many at a time."""
REMEMBERED_BLOCKS = 4096
ID_OF_NUMBER = tuple(TOKEN_IDS[0] + number % (TOKEN_IDS[1] - TOKEN_IDS[0]) for number in range(1 << 16))
"""Every number of two bytes as a token id."""


def draw_tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    """`count` token ids."""
    return tuple(rng.choices(range(*TOKEN_IDS), k=count))


@lru_cache(maxsize=REMEMBERED_BLOCKS)
def drawn_block(seed: str, count: int) -> "array[int]":
    """The same ids for the same seed, two bytes each; the last few thousand blocks are remembered.

    They are bytes of a hash, since prompts are made while other streams are timed: seeding a generator for every block of
    sixteen tokens takes ten times as long.
    """
    numbers = array("H", hashlib.shake_128(seed.encode()).digest(2 * count))
    return array("H", map(ID_OF_NUMBER.__getitem__, numbers))


class RecordedTokens(Sequence[int]):
    """Token ids of a recorded prompt, made when they are read: what is kept are the ids of its blocks.

    A trace of 145 million tokens is three megabytes of block ids. Equal ids in one scope are equal tokens.

    Args:
        scope: the seed of the blocks.
        hash_ids: one for every `block` tokens, from the beginning.
        own: the seed of the tokens beyond the named blocks.
        length: of the whole prompt.
        alphabet: what each id of `TOKEN_IDS` is replaced by; None for nothing.
    """

    def __init__(
        self,
        scope: str,
        hash_ids: Sequence[int],
        block: int,
        own: str,
        length: int,
        alphabet: tuple[int, ...] | None = None,
    ) -> None:
        self._scope, self._hash_ids, self._block = scope, hash_ids, block
        self._own, self._length, self._alphabet = own, length, alphabet
        self._named = min(len(hash_ids) * block, length)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[int, ...]: ...
    def __getitem__(self, place: int | slice) -> int | tuple[int, ...]:
        if isinstance(place, int):
            if not -self._length <= place < self._length:
                raise IndexError(place)
            return self._between(place % self._length, place % self._length + 1)[0]
        begin, end, step = place.indices(self._length)
        return self._between(begin, end) if step == 1 else tuple(self)[place]

    def __iter__(self) -> Iterator[int]:
        for begin in range(0, self._length, OWN_TOKENS):
            yield from self._between(begin, min(begin + OWN_TOKENS, self._length))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, RecordedTokens):
            return self._facts() == other._facts() or (len(self) == len(other) and tuple(self) == tuple(other))
        return isinstance(other, tuple) and len(other) == len(self) and tuple(self) == other

    def __hash__(self) -> int:
        return hash(tuple(self))

    def renamed(self, alphabet: tuple[int, ...]) -> "RecordedTokens":
        """The same prompt in other ids."""
        low = TOKEN_IDS[0]
        if self._alphabet is not None:
            alphabet = tuple(alphabet[token - low] for token in self._alphabet)
        return RecordedTokens(self._scope, self._hash_ids, self._block, self._own, self._length, alphabet)

    def _facts(self) -> tuple[object, ...]:
        return (self._scope, self._hash_ids, self._block, self._own, self._length, self._alphabet)

    def _between(self, begin: int, end: int) -> tuple[int, ...]:
        """The tokens from `begin` to `end`, without the blocks before and after."""
        tokens: array[int] = array("H")
        while begin < end:
            if begin < self._named:
                number, size, start, limit = begin // self._block, self._block, 0, self._named
                seed = f"{self._scope} block {self._hash_ids[number]}"
            else:
                number, size, start, limit = (begin - self._named) // OWN_TOKENS, OWN_TOKENS, self._named, self._length
                seed = f"{self._own} part {number}"
            first = start + number * size
            upto = min(end, limit, first + size)
            tokens += drawn_block(seed, size)[begin - first : upto - first]
            begin = upto
        if self._alphabet is None:
            return tuple(tokens)
        return tuple(self._alphabet[token - TOKEN_IDS[0]] for token in tokens)


def renamed(tokens: Sequence[int], alphabet: tuple[int, ...]) -> Sequence[int]:
    """The same tokens in other ids; those that are made when they are read stay so.

    Args:
        alphabet: what each id of `TOKEN_IDS` is replaced by, in order.
    """
    if isinstance(tokens, RecordedTokens):
        return tokens.renamed(alphabet)
    return tuple(alphabet[token - TOKEN_IDS[0]] for token in tokens)
