"""Whose a request is: the program it belongs to, named by its client or found by what its prompt begins with.

A request with a session id belongs to the program of that name, or to that of the session that its client says started it
(`agent_parent`). Session ids, and ids of responses, of another cache salt or adapter are other ones (`Call.tenant`). Without a
session id it belongs to the program of the request whose prompt and answer its own prompt begins with (`Lineage`): an agent's
next prompt begins with its last prompt and answer. Where the answer was rewritten meanwhile, it belongs to that of the request
whose prompt it begins with (`RewrittenHistories`). Else it is the first of a new program.
"""

import re
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from vllm_agentserve.policy.call import Call, Owner
from vllm_agentserve.policy.engine import NoAttribution
from vllm_agentserve.policy.program import SESSION, bounded
from vllm_agentserve.policy.rewritten import Answered, RewrittenHistories
from vllm_agentserve.policy.sequences import MOST_BYTES, SequenceTable

RESPONSE = re.compile(r"resp_[0-9a-zA-Z]{1,64}")
"""How vLLM's ids of requests begin that came as `/v1/responses`."""
MOST_RESPONSES = 16_384
WEAK_OUTPUT_TOKENS = 4
"""Tokens of the answer that a continuation must share at least: a client's template may write the rest with other tokens."""


@dataclass(slots=True)
class Remembered:
    """A token sequence that an agent's next prompt would begin with.

    Args:
        program: whose it is.
        path_ms: length of the path to its end, see `ProgramTable`.
        tail: its tokens after its last full block.
        continued: how often a prompt went on from it.
        end: number of the end of the call it is from, see `ProgramTable`.
        weak: whether it ends within the answer.
    """

    program: str
    path_ms: float
    tail: "array[int]"
    continued: int = 0
    end: int = 0
    weak: bool = False

    def token_arrays(self) -> "Iterator[array[int]]":
        yield self.tail


class Lineage(SequenceTable[Remembered]):
    """Remembers finished sequences by the hash of their last full block, which covers everything before it.

    A prompt continues the longest remembered sequence it begins with, exact to the token, and is longer than that. So a shared
    system prompt joins nobody: no sequence ends inside it. Identical prompts are not joined; when identical sequences are
    there to go on from, the one that was continued less is taken. A fork goes on from the same sequence twice, and stays in
    the program; an edited history begins a new one. Sequences shorter than a block are not remembered.

    Args:
        block_size: tokens per block.
        capacity: sequences remembered, the oldest are forgotten first.
        most_bytes: that they may take.
    """

    def __init__(self, block_size: int, capacity: int = 16_384, most_bytes: int = MOST_BYTES) -> None:
        super().__init__(block_size, capacity, most_bytes)

    def remember(
        self,
        program: str,
        path_ms: float,
        hashes: Sequence[Hashable],
        tokens: Sequence[int],
        prompt_tokens: int,
        end: int = 0,
    ) -> None:
        """Takes in a finished request.

        Args:
            program: whose it is.
            path_ms: length of the path to its end.
            hashes: of the full blocks of `tokens`, as far as they are known.
            tokens: prompt and answer.
            prompt_tokens: how many of them are the prompt.
            end: number of the end of the request.
        """
        answered = len(tokens) - prompt_tokens
        for length in {len(tokens), prompt_tokens + min(answered, WEAK_OUTPUT_TOKENS)}:
            blocks = min(len(hashes), length // self._block_size)
            # A tail of two blocks would mean that hashes are missing: nothing to find it by.
            if not answered or not blocks or length - blocks * self._block_size >= 2 * self._block_size:
                continue
            # Four bytes a token: as a tuple the longest tails would keep ten times as much.
            tail = array("i", tokens[blocks * self._block_size : length])
            self._keep(hashes[blocks - 1], Remembered(program, path_ms, tail, end=end, weak=length < len(tokens)))

    def find(self, hashes: Sequence[Hashable], tokens: Sequence[int]) -> Remembered | None:
        """The sequence this prompt goes on from, None if there is none; one look-up per full block, the last one first."""
        for blocks in range(len(hashes), 0, -1):
            found = self._by_hash.get(hashes[blocks - 1])
            if found is None:
                continue
            begin = blocks * self._block_size
            fitting = [
                one
                for one in found
                if begin + len(one.tail) < len(tokens) and array("i", tokens[begin : begin + len(one.tail)]) == one.tail
            ]
            if fitting:
                best = min(fitting, key=lambda one: (-len(one.tail), one.continued))
                best.continued += 1
                return best
        return None


class Families:
    """Remembers, for sessions that named a parent, the first of the family; bounded, the longest unseen is forgotten first.

    What a session said first holds: it cannot move to another program later.

    Args:
        capacity: sessions remembered.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        self._roots: OrderedDict[str, str] = OrderedDict()
        self._capacity = capacity

    def __len__(self) -> int:
        return len(self._roots)

    def root(self, session: str, parent: str | None) -> str:
        """The session whose program this one belongs to: itself without a parent, else the root of the parent as known."""
        known = self._roots.get(session)
        if known is None:
            if parent is None or parent == session:
                return session
            known = self._roots[session] = self._roots.get(parent, parent)
            if len(self._roots) > self._capacity:
                self._roots.popitem(last=False)
        self._roots.move_to_end(session)
        return known


class Attribution(NoAttribution):
    """Says whose a request is, and remembers finished ones.

    Args:
        block_size: tokens per KV block, whose hashes requests carry.
    """

    def __init__(self, block_size: int) -> None:
        self._lineage = Lineage(block_size)
        self._rewritten = RewrittenHistories(block_size)
        self._families = Families()
        self._responses: OrderedDict[tuple[str, str], tuple[str, float, int]] = OrderedDict()
        """(program, length of the path, number of the end) by tenant and by the id of a response that a client may name."""

    def owner(self, call: Call) -> Owner:
        request, hints = call.request, call.hints
        found = self._found(request.block_hashes, request.prompt_token_ids or ())
        session = call.named_session if call.named_session is not None else hints.parent
        if session is not None:
            # Who only names its parent is one of its threads, like a sub-agent with a session of its own.
            tenant = f"{call.tenant}{SESSION}"
            own, parent = f"{tenant}{session}", None if hints.parent is None else f"{tenant}{hints.parent}"
            key = self._families.root(own, parent)
            thread = hints.thread or (session if key != own else None)
            child = key != own or call.named_session is None
            if found is not None and found.program == key:
                return Owner(key, found.path_ms, thread, found.end, sub_agent=child)
            return Owner(key, thread=thread, sub_agent=child)
        answered = None if hints.previous is None else self._responses.get((call.tenant, hints.previous))
        if answered is not None:
            key, path_ms, end = answered
            return Owner(key, path_ms, hints.thread, end)
        if found is not None:
            return Owner(found.program, found.path_ms, hints.thread, found.end, "inferred")
        return Owner(f"request {bounded(call.name)}", 0.0, hints.thread, source="new")

    def remember(self, call: Call, path_ms: float, end: int) -> None:
        request = call.request
        if request.num_output_tokens and call.owner is not None:
            key, prompt_tokens = call.owner.key, request.num_prompt_tokens
            hashes, tokens, deep = request.block_hashes, request.all_token_ids, call.owner.source == "inferred"
            self._lineage.remember(key, path_ms, hashes, tokens, prompt_tokens, end)
            self._rewritten.remember(key, path_ms, hashes, tokens, prompt_tokens, end, deep)
            response = RESPONSE.match(call.name)
            if response is not None:
                named = call.tenant, response[0]
                self._responses[named] = key, path_ms, end
                self._responses.move_to_end(named)
                if len(self._responses) > MOST_RESPONSES:
                    self._responses.popitem(last=False)

    def _found(self, hashes: Sequence[Hashable], tokens: Sequence[int]) -> Remembered | Answered | None:
        """The call whose answer a prompt goes on from: as it was, or else as it may have been rewritten.

        Answers to the same prompt often begin alike. Where no more than the beginning is found, the rest decides.
        """
        found = self._lineage.find(hashes, tokens)
        if found is None or found.weak:
            return self._rewritten.find(hashes, tokens) or found
        return found
