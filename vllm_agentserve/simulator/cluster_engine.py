"""One engine of several: it is told the time, and says when what it does next is done.

Calls are admitted in order of arrival while slots, tokens and KV cache last, prompts are cut into chunks that share steps with
decodes, as in vLLM. A call takes the KV it will need when it is admitted, so none is preempted. Steps that only decode are
taken together until something changes.
"""

from collections import deque
from dataclasses import dataclass
from math import inf

from vllm_agentserve.bench.cost import StepCost
from vllm_agentserve.simulator.kv_contexts import KvContexts


@dataclass(frozen=True)
class Power:
    """Watts of an engine: without work, in steps, and in the part of them that computes prompts."""

    idle: float
    decode: float
    prefill: float


@dataclass(frozen=True)
class Tier:
    """A kind of engine.

    Args:
        cost: of its steps.
        capacity: tokens of its KV cache.
        power: see `Power`.
        slots: sequences at once.
        step_tokens: tokens of a step at most.
    """

    cost: StepCost
    capacity: int
    power: Power
    slots: int = 64
    step_tokens: int = 2048


@dataclass(slots=True)
class Job:
    """A call, or the prompt of one, on an engine.

    Args:
        name: of its conversation.
        prompt: tokens of the whole prompt.
        answer: tokens to decode.
        context: tokens of the prompt that earlier turns left.
        handover: whether only the prompt is computed here.
        brought: tokens whose KV was moved here with the call.
    """

    name: str
    turn: int
    prompt: int
    answer: int
    context: int
    handover: bool = False
    brought: int = 0
    queued: int = 0
    """Tokens to compute, as it came."""
    computed: int = 0
    left: int = 0
    """Tokens to decode."""
    first_s: float = inf
    """When its first token was there."""


@dataclass(slots=True)
class Work:
    """What an engine did: seconds of its steps, of the part that computed prompts, and tokens of prompts that were computed."""

    step_s: float = 0.0
    prefill_s: float = 0.0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    sought: int = 0
    """Tokens of contexts that came back."""
    found: int = 0


class ClusterEngine:
    """One engine.

    Args:
        name: unique.
        tier: what it is.
    """

    def __init__(self, name: str, tier: Tier) -> None:
        self.name = name
        self.tier = tier
        self.kv = KvContexts(tier.capacity)
        self.work = Work()
        self.waiting: deque[Job] = deque()
        self.prefilling: list[Job] = []
        self.decoding: list[Job] = []
        self.until_s = inf
        """When what it does now is done."""
        self.version = 0
        """Changes with `until_s`."""
        self.contexts = 0
        """Tokens that the decoding calls attend to, together."""
        self.waiting_tokens = 0
        """Prompt tokens to compute of the calls that wait."""
        self._began_s = 0.0
        self._steps = 0
        """Steps of decodes that are taken together; 0 for a step with prompts."""
        self._chunks: list[tuple[Job, int]] = []

    @property
    def running(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def submit(self, job: Job, now_s: float) -> None:
        """A call comes."""
        self.waiting.append(job)
        job.queued = job.prompt - max(self.kv.cached(job.name), job.brought)
        self.waiting_tokens += job.queued
        if self.until_s == inf:
            self._begin(now_s)
        elif self._steps > 1 and len(self.decoding) < self.tier.slots:
            self._stop_after(now_s)

    def finish(self) -> list[Job]:
        """What it did is done; returns the calls that ended, and goes on."""
        now_s = self.until_s
        took_s = now_s - self._began_s
        self.work.step_s += took_s
        if self._steps:
            ended = self._decoded(self._steps)
        else:
            self.work.prefill_s += self._chunks_ms() / 1000
            ended = self._decoded(1)
            for job, tokens in self._chunks:
                job.computed += tokens
                self.work.prompt_tokens += tokens
                if job.computed < job.prompt:
                    continue
                self.prefilling.remove(job)
                job.first_s = now_s
                job.left = job.answer - 1
                if job.left <= 0:
                    ended.append(job)
                else:
                    self.decoding.append(job)
                    self.contexts += job.prompt + 1
        for job in ended:
            self.work.answer_tokens += 0 if job.handover else job.answer
            self.kv.end(job.name, job.prompt + job.answer)
        self._begin(now_s)
        return ended

    def fail(self) -> list[Job]:
        """The engine dies and loses everything; returns the calls it had."""
        lost = [*self.prefilling, *self.decoding, *self.waiting]
        self.waiting.clear()
        self.prefilling, self.decoding, self._chunks = [], [], []
        self.contexts = self.waiting_tokens = 0
        self.kv.clear()
        self._set(inf)
        return lost

    def joules(self, makespan_s: float) -> float:
        """Energy over so many seconds."""
        power, work = self.tier.power, self.work
        idle_s = max(makespan_s - work.step_s, 0.0)
        decode_s = work.step_s - work.prefill_s
        return power.idle * idle_s + power.decode * decode_s + power.prefill * work.prefill_s

    def _set(self, until_s: float) -> None:
        self.until_s = until_s
        self.version += 1

    def _begin(self, now_s: float) -> None:
        """The next step with prompts, or the next steps of decodes."""
        cost, tier = self.tier.cost, self.tier
        self._chunks = []
        room = tier.step_tokens - len(self.decoding)
        for job in self.prefilling:
            if room <= 0:
                break
            room -= self._chunk(job, room)
        while room > 0 and self.waiting and self.running < tier.slots and self._admit(self.waiting[0]):
            job = self.waiting.popleft()
            self.prefilling.append(job)
            room -= self._chunk(job, room)
        self._began_s = now_s
        decodes = len(self.decoding)
        if self._chunks:
            self._steps = 0
            chunks = [(tokens, job.computed) for job, tokens in self._chunks]
            self._set(now_s + cost.step_ms(decodes, self.contexts, chunks) / 1000)
        elif decodes:
            self._steps = min(job.left for job in self.decoding)
            self._set(now_s + self._decode_s(self._steps))
        else:
            self._set(inf)

    def _admit(self, job: Job) -> bool:
        cached = self.kv.cached(job.name)
        if not self.kv.begin(job.name, job.prompt + job.answer):
            return False
        self.waiting_tokens -= job.queued
        if not job.handover:
            self.work.sought += job.context
            self.work.found += min(cached, job.context)
        job.computed = min(max(cached, job.brought), job.prompt - 1)
        return True

    def _chunk(self, job: Job, room: int) -> int:
        tokens = min(job.prompt - job.computed, room)
        self._chunks.append((job, tokens))
        return tokens

    def _chunks_ms(self) -> float:
        cost = self.tier.cost
        return cost.prefill + sum(cost.chunk_ms(tokens, job.computed) for job, tokens in self._chunks)

    def _decode_s(self, steps: int) -> float:
        """Contexts grow by a token a step."""
        decodes = len(self.decoding)
        each = self.tier.cost.decode_ms(decodes, self.contexts)
        grows = self.tier.cost.context * decodes / 1000
        return (steps * each + grows * steps * (steps - 1) / 2) / 1000

    def _stop_after(self, now_s: float) -> None:
        """The step that runs is the last of those that are taken together."""
        each_s = self._decode_s(1)
        steps = min(int((now_s - self._began_s) / each_s) + 1, self._steps)
        while steps > 1 and self._decode_s(steps - 1) >= now_s - self._began_s:
            steps -= 1
        self._steps = steps
        self._set(self._began_s + self._decode_s(steps))

    def _decoded(self, steps: int) -> list[Job]:
        """The calls that ended with so many tokens more each."""
        ended = []
        for job in self.decoding:
            job.left -= steps
            if job.left <= 0:
                ended.append(job)
        self.contexts += steps * len(self.decoding)
        if ended:
            self.decoding = [job for job in self.decoding if job.left > 0]
            self.contexts -= sum(job.prompt + job.answer for job in ended)
        return ended
