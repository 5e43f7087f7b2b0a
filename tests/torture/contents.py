"""What KV blocks hold, compared with what the tokens of their prefix give: the blocks lane jobs read and write, and all in the
prefix cache."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import LLM
from vllm.v1.core.kv_cache_utils import get_block_hash

from tests.torture.expected import Expected
from tests.torture.reference import Reference
from vllm_agentserve.lanes.cpu.process import ProcessLane
from vllm_agentserve.policy.jobs import Job

TOLERANCE = 2e-4
"""How near float32 has keys and values, of about 3, that were computed in other chunks; seen are differences up to 5e-5."""
LOGIT_TOLERANCE = 2e-3
"""The same of logits: a token that is the likeliest but for this is right."""
PENDING_MIB = 64
"""Copies of blocks are compared when there are so many, and at the end of an episode: comparing takes time, and the engine under
test is not to be slowed down at every job."""


@dataclass
class Looked:
    """How many blocks were compared, and how many were wrong, by occasion; a wrong one counts once in an episode."""

    jobs: int = 0
    jobs_behind_a_prefix: int = 0
    read: int = 0
    """Blocks before a job's first token, when the job was sent."""
    kept: int = 0
    """The same blocks when the job had ended."""
    written: int = 0
    """Blocks that jobs filled, when they had ended."""
    published: int = 0
    """Blocks of the prefix cache, between steps."""
    answers: int = 0
    """Tokens of greedy answers."""
    wrong_read: int = 0
    wrong_kept: int = 0
    wrong_written: int = 0
    wrong_published: int = 0
    wrong_answers: int = 0
    largest_difference: float = 0.0
    """Between a block that is right and the reference."""


@dataclass(frozen=True)
class Copy:
    """Blocks [first, …) of a sequence as they were at one moment.

    Args:
        what: "read", "kept" or "written".
        hashes: of the whole sequence's full blocks.
        tokens: of the sequence, up to the last one that has to be in the blocks.
        data: shape (layers, blocks, KV heads, block size, 2 x head size).
    """

    what: str
    name: str
    hashes: list[bytes]
    tokens: list[int]
    first: int
    ids: list[int]
    data: Tensor


class Contents:
    """Watches an engine in this process; `close` ends that.

    Args:
        llm: with our scheduler, or stock vLLM, of which only the prefix cache is compared.
    """

    def __init__(self, llm: LLM, reference: Reference) -> None:
        core: Any = llm.llm_engine.engine_core.engine_core
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        self.looked = Looked()
        self._reference = reference
        self._layers = list(layers.values())
        self.memory: list[Tensor] = core.model_executor.driver_worker.worker.model_runner.kv_caches
        self.pool = core.scheduler.kv_cache_manager.block_pool
        self._block_size: int = core.scheduler.block_size
        self.begin()
        add = core.scheduler.add_request

        def seen(request: Any) -> None:
            self._requests[request.request_id] = request
            add(request)

        core.scheduler.add_request = seen
        self._original = {name: getattr(ProcessLane, name) for name in ("submit", "cancel", "poll")}
        for name in self._original:
            setattr(ProcessLane, name, self._watched(name))

    def close(self) -> None:
        for name, method in self._original.items():
            setattr(ProcessLane, name, method)

    def begin(self) -> None:
        """An episode begins: whatever was known of the last one's tokens is forgotten."""
        self._expected = Expected(self._reference, self._block_size, self._write)
        self._requests: dict[str, Any] = {}
        self._jobs: dict[str, Job] = {}
        self._pending: list[Copy] = []
        self._said: set[tuple[str, str, bytes]] = set()

    # -- copies -------------------------------------------------------------------------------------------------------------

    def _watched(self, name: str) -> Callable[..., Any]:
        original, mine = self._original[name], getattr(self, "_" + name)

        def method(lane: ProcessLane, *args: Any, **named: Any) -> Any:
            return mine(lambda: original(lane, *args, **named), *args)

        return method

    def _submit(self, call: Callable[[], None], job: Job) -> None:
        # From here on the other process may read what is before the job's first token.
        self.looked.jobs += 1
        self.looked.jobs_behind_a_prefix += job.start > 0
        self._jobs[job.request_id] = job
        self._copy("read", job, 0, job.start)
        call()

    def _cancel(self, call: Callable[[], None], request_id: str) -> None:
        self._jobs.pop(request_id, None)
        call()

    def _poll(self, call: Callable[[], list[Any]], *_: Any) -> list[Any]:
        outcomes = call()
        for outcome in outcomes:
            job = self._jobs.pop(outcome.request_id, None)
            if job is not None and outcome.error is None:
                self._copy("kept", job, 0, job.start)
                self._copy("written", job, job.start, job.end)
        return outcomes

    def _copy(self, what: str, job: Job, begin: int, end: int) -> None:
        first = begin // self._block_size
        ids = job.block_ids[0][first : -(-end // self._block_size)]
        if ids and begin < end:
            hashes = self._requests[job.request_id].block_hashes
            copy = Copy(what, name_of(job.request_id), hashes, job.token_ids[:end], first, ids, self._at(ids))
            self._pending.append(copy)

    def _at(self, ids: list[int]) -> Tensor:
        return torch.stack([memory[ids] for memory in self.memory])

    def _write(self, kv: Tensor) -> Tensor:
        blocks = [torch.full((1, *memory.shape[1:]), torch.nan) for memory in self.memory]
        slots = torch.arange(kv.shape[2])
        for layer, (key, value), block in zip(self._layers, kv, blocks, strict=True):
            layer.impl.do_kv_cache_update(layer, key.contiguous(), value.contiguous(), block, slots)
        return torch.stack([block[0] for block in blocks])

    # -- comparing ----------------------------------------------------------------------------------------------------------

    def after_step(self) -> list[str]:
        """Compares what was copied, if it is much."""
        size = sum(copy.data.nbytes for copy in self._pending)
        return self.compare() if size > PENDING_MIB << 20 else []

    def compare(self) -> list[str]:
        """What was wrong in blocks that were copied when a job read or wrote them."""
        for request in self._requests.values():
            self._expected.learn(request)
        pending, self._pending, found = self._pending, [], []
        for copy in pending:
            size, full = self._block_size, len(copy.tokens) // self._block_size
            names = [*copy.hashes[copy.first : full]]
            expected = [self._expected.block(name) for name in reversed(names)][::-1]
            if full * size < len(copy.tokens):
                before = copy.hashes[full - 1] if full else None
                expected.append(self._expected.begun(before, copy.tokens[full * size :]))
                names.append(b"")
            found += self._differ(copy.what, copy.name, names, copy.ids, copy.data, torch.stack(expected, dim=1))
        return found

    def published(self) -> list[str]:
        """What is wrong in the prefix cache; between two steps whatever is in it has been computed."""
        for request in self._requests.values():
            self._expected.learn(request)
        blocks, found = [], []
        for block in self.pool.blocks:
            if block.block_hash is not None:
                name = get_block_hash(block.block_hash)
                depth = self._expected.depth(name)
                if depth is None:
                    found.append(f"KV block {block.block_id} is in the prefix cache, and is of no request")
                else:
                    blocks.append((depth, block.block_id, name))
        if blocks:
            blocks.sort(reverse=True)  # so that a prefix is computed in one go
            expected = torch.stack([self._expected.block(name) for _, _, name in blocks], dim=1)
            ids, names = [number for _, number, _ in blocks], [name for _, _, name in blocks]
            found += self._differ("published", "the prefix cache", names, ids, self._at(ids), expected)
        return found

    def _differ(
        self, what: str, whose: str, names: list[bytes], ids: list[int], data: Tensor, expected: Tensor
    ) -> list[str]:
        unwritten = expected.isnan()
        apart = torch.where(unwritten, 0.0, data - expected).abs().amax(dim=(0, 2, 3, 4)).tolist()
        setattr(self.looked, what, getattr(self.looked, what) + len(ids))
        found = []
        for name, number, difference in zip(names, ids, apart, strict=True):
            if difference <= TOLERANCE:
                self.looked.largest_difference = max(self.looked.largest_difference, difference)
                continue
            if (what, whose, name) not in self._said:
                self._said.add((what, whose, name))
                setattr(self.looked, f"wrong_{what}", getattr(self.looked, f"wrong_{what}") + 1)
                found.append(f"{whose}: KV block {number}, {what}, is off by {difference:.2g}")
        return found

    def answers(self) -> list[str]:
        """Tokens of greedy answers that are not the likeliest ones; of all requests of the episode, aborted ones too."""
        found = []
        for name, request in self._requests.items():
            self._expected.learn(request)
            count, size = request.num_output_tokens, self._block_size
            if not count or not greedy(request.sampling_params):
                continue
            tokens = list(request.all_token_ids[:-1])
            full = (len(tokens) - count) // size
            past = self._expected.past(request.block_hashes[full - 1] if full else None)
            hidden = self._reference.extend(past, tokens[full * size :])[1][-count:]
            logits = self._reference.logits(hidden)
            given = logits.gather(1, torch.tensor(request.all_token_ids[-count:])[:, None])[:, 0]
            self.looked.answers += count
            if wrong := int((given < logits.amax(dim=1) - LOGIT_TOLERANCE).sum()):
                self.looked.wrong_answers += wrong
                found.append(f"{name_of(name)}: {wrong} of {count} tokens are not the likeliest")
        return found


def greedy(parameters: Any) -> bool:
    """Whether an answer has the likeliest token everywhere."""
    changed = parameters.structured_outputs or parameters.repetition_penalty != 1 or parameters.presence_penalty
    return parameters.temperature == 0 and not changed


def name_of(request_id: str) -> str:
    """What the request was called before vLLM added eight random characters."""
    return request_id.rpartition("-")[0] or request_id
