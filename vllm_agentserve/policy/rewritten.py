"""Which program a prompt goes on from when its history was rewritten: it begins with an earlier prompt, but not with its answer.

Chat templates leave the reasoning of earlier answers out, and write tool calls anew. The next prompt of an agent then begins
with a whole earlier prompt, and has something else where the answer was. `Lineage` does not find it.

The rule. A prompt P goes on from an earlier prompt E when

- P begins with all of E, and shares with E's answer four tokens in a row, or a whole end of at least two tokens right after E,
- or P begins with all of E, and E itself went on from another call,
- or P leaves E within its last `SLACK` tokens, and goes on right there with four tokens in a row of E's answer. So it is where
  the template opens the reasoning itself, and leaves the opening out later,
- or P begins with all of E, has the last token of E's answer somewhere behind it, and ends with the two tokens that E ends with:
  so it is where a template opens the assistant's turn. Nothing of the answer needs to be there. A grammar may make a model write
  a tool call in tokens that no tokenizer gives for its text, and an answer of a call without arguments has nothing to share. So
  this holds once for each E, and only if no other prompt like E waits to be gone on from.

Of several such prompts the longest counts, then the one whose answer shares most with P, then the one gone on from less often.
An earlier prompt that is identical to P is none: P must be longer. So a shared system prompt, a fork of another context and the
same task given to several agents join nobody: what their prompts share is no whole prompt, or none of its answer is there.
"""

from array import array
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import sqrt

from vllm_agentserve.policy.sequences import MOST_BYTES, SequenceTable

SLACK = 16
"""Tokens at the end of a prompt that open an answer: they may be missing when the answer is written into a history."""
GRAM = 4
"""Tokens in a row that an answer and a later prompt must share."""
OPENING = 2
"""Tokens at the end of a prompt that open the assistant's turn: `assistant` and a line break, or the like."""
KEPT = 512
"""Tokens that are kept of the end of an answer."""
COMPARED = 128
"""Of these, the last ones that are looked for anywhere in what follows the prompt."""
LONGEST_ANSWER = 8192
"""In so many tokens after the prompt its answer is looked for, at most."""
MOST_COMPARED = 32
"""After so many earlier prompts, the longest first, a look-up ends: it holds up the whole engine. Those of one block are all
compared, `ALIKE` at most."""


@dataclass(slots=True)
class Answered:
    """A prompt whose answer is known.

    Args:
        program: whose it is.
        path_ms: length of the path to the end of its answer, see `ProgramTable`.
        end: number of that end.
        tail: tokens of the prompt after the block that it is found by.
        answer: the last tokens of its answer.
        length: tokens of the whole answer.
        deep: whether the prompt itself went on from another call.
        continued: how often a prompt went on from it.
    """

    program: str
    path_ms: float
    end: int
    tail: "array[int]"
    answer: "array[int]"
    length: int
    deep: bool
    continued: int = 0

    def token_arrays(self) -> "Iterator[array[int]]":
        yield self.tail
        yield self.answer


class RewrittenHistories(SequenceTable[Answered]):
    """Remembers prompts that were answered, by the hash of a block near their end.

    Args:
        block_size: tokens per block.
        capacity: prompts remembered, the oldest are forgotten first.
        most_bytes: that they may take.
    """

    def __init__(self, block_size: int, capacity: int = 8192, most_bytes: int = MOST_BYTES) -> None:
        super().__init__(block_size, capacity, most_bytes)

    def remember(
        self,
        program: str,
        path_ms: float,
        hashes: Sequence[Hashable],
        tokens: Sequence[int],
        prompt_tokens: int,
        end: int = 0,
        deep: bool = False,
    ) -> None:
        """Takes in a finished request; arguments as in `Lineage.remember`, `deep` as in `Answered`."""
        length, size = len(tokens) - prompt_tokens, self._block_size
        blocks = min(len(hashes), (prompt_tokens - SLACK) // size)
        # A longer tail would mean that hashes are missing.
        if length < 1 or blocks < 1 or prompt_tokens - blocks * size >= 2 * size + SLACK:
            return
        tail = array("i", tokens[blocks * size : prompt_tokens])
        answer = array("i", tokens[max(prompt_tokens, len(tokens) - KEPT) :])
        self._keep(hashes[blocks - 1], Answered(program, path_ms, end, tail, answer, length, deep))

    def find(self, hashes: Sequence[Hashable], tokens: Sequence[int]) -> Answered | None:
        """The prompt this one goes on from, None if there is none, or none among the first `MOST_COMPARED` it begins with."""
        compared = 0
        for blocks in range(len(hashes), 0, -1):
            found = self._by_hash.get(hashes[blocks - 1])
            if found is None:
                continue
            best, more = best_of(found, tokens, blocks * self._block_size)
            if best is not None:
                best.continued += 1
                return best
            compared += more
            if compared >= MOST_COMPARED:
                return None
        return None


def best_of(found: Sequence[Answered], tokens: Sequence[int], begin: int) -> tuple[Answered | None, int]:
    """Of prompts found by the same block the one that a prompt goes on from, None if there is none; how many were compared.

    What the answers of several have in common, such as the words around a tool call, says little: tokens in a row count the
    less, the more of the answers have them.

    Args:
        found: the prompts.
        tokens: of the prompt that goes on.
        begin: where its tokens after the block begin.
    """
    head = array("i", tokens[begin : begin + max(len(one.tail) for one in found) + GRAM])
    places: list[tuple[Answered, int]] = []
    for one in found:
        common, length = shared_tokens(one.tail, head), len(one.tail)
        whole = common == length < len(head)
        if whole or (length - SLACK <= common < length and holds(one.answer, head[common : common + GRAM])):
            places.append((one, common))
    longest = max((len(one.tail) for one, _ in places), default=0)
    places = [(one, place) for one, place in places if len(one.tail) == longest]
    rests = {
        place: Rest(tokens, begin + place, [one for one, at in places if at == place])
        for place in {place for _, place in places}
    }
    written = [rests[place].compared(one) for one, place in places]
    having = Counter(run for answer, _ in written for run in answer)
    best: tuple[float, int] | None = None
    chosen = None
    for (one, place), (answer, shared) in zip(places, written, strict=True):
        if one.deep or any(len(run) == GRAM for run in shared) or shared_end(one.answer, rests[place].tokens):
            likeness = sum(1 / having[run] for run in shared) / sqrt(sum(1 / having[run] for run in answer))
            rank = (likeness, -one.continued)
            if best is None or rank > best:
                best, chosen = rank, one
    if chosen is None:
        waiting = [(one, place) for one, place in places if not one.continued]
        if len(waiting) == 1 and answers(*waiting[0], rests[waiting[0][1]].tokens, tokens):
            chosen = waiting[0][0]
    return chosen, len(places)


def answers(one: Answered, place: int, rest: "array[int]", tokens: Sequence[int]) -> bool:
    """Whether a prompt has something in the place of an answer, by how it is put together alone.

    Args:
        one: the earlier prompt.
        place: how many tokens of its tail the later prompt begins with.
        rest: what follows in the later one.
        tokens: of the later one.
    """
    whole = place == len(one.tail)
    return whole and one.answer[-1] in rest and array("i", tokens[-OPENING:]) == one.tail[-OPENING:]


class Rest:
    """What follows one or more earlier prompts in a later one: read once, however many there are.

    Args:
        tokens: of the later prompt.
        begin: where the rest begins.
        answered: the earlier prompts.
    """

    def __init__(self, tokens: Sequence[int], begin: int, answered: Sequence[Answered]) -> None:
        most = max(min(one.length, LONGEST_ANSWER) for one in answered) + KEPT
        self.tokens = array("i", tokens[begin : begin + most])
        wanted = set[tuple[int, ...]]().union(*(runs_of(one.answer[-COMPARED:]) for one in answered))
        self._ends: dict[tuple[int, ...], int] = {}
        """By runs of tokens of the answers: where the first one here ends."""
        for size in range(1, GRAM + 1):
            for place, run in enumerate(zip(*(self.tokens[skip:] for skip in range(size)), strict=False)):
                if run in wanted and run not in self._ends:
                    self._ends[run] = place + size

    def compared(self, one: Answered) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
        """Runs of tokens of an answer, and those of them that stand in its place now.

        The last token of an answer ends it in the history too. As long as what is before it there is the end of the answer that
        is compared: reasoning comes first, and is left out. An answer that was cut off is compared with all that it may have
        become.
        """
        length = min(one.length, LONGEST_ANSWER)
        least = max(min(GRAM, length) - 1, 0)
        with suppress(ValueError):
            place = self.tokens.index(one.answer[-1], least, length + KEPT)
            now = runs_of(self.tokens[max(place + 1 - COMPARED, 0) : place + 1])
            answer = runs_of(one.answer[-min(place + 1 + GRAM, COMPARED) :])
            shared = answer & now
            if any(len(run) == GRAM for run in shared):
                return answer, shared
        answer, most = runs_of(one.answer[-COMPARED:]), length + SLACK
        return answer, {run for run in answer if self._ends.get(run, most + 1) <= most}


def shared_tokens(one: "array[int]", other: "array[int]") -> int:
    """How many tokens both begin with."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(place for place in range(most) if one[place] != other[place])


def runs_of(tokens: "array[int]") -> set[tuple[int, ...]]:
    """All runs of one to four tokens in a row."""
    return {run for size in range(1, GRAM + 1) for run in zip(*(tokens[place:] for place in range(size)), strict=False)}


def shared_end(answer: "array[int]", rest: "array[int]") -> int:
    """How many tokens at the end of an answer are what follows its prompt now; 0 if it is one or none."""
    most = min(len(answer), len(rest), GRAM)
    return next((size for size in range(most, 1, -1) if answer[-size:] == rest[:size]), 0)


def holds(answer: "array[int]", part: "array[int]") -> bool:
    """Whether an answer has these tokens in a row."""
    if len(part) < GRAM:
        return False
    return any(
        answer[place : place + GRAM] == part for place in range(len(answer) - GRAM + 1) if answer[place] == part[0]
    )
