"""Requests that make a scheduler's life hard, fed to an engine step by step, and what it answered."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

TOP = 5
"""Log-probabilities kept per position beside the chosen token's."""


@dataclass(frozen=True)
class ScriptedRequest:
    """One request.

    Args:
        step: engine step before which it comes.
        temperature: 0 is greedy; otherwise `seed` is given.
        abort_after: its client goes away after so many tokens.
        pinned: every token of its answer has to be this one, so every run has the same context at every position; the
            log-probabilities are those of the free choice all the same.
    """

    name: str
    step: int
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    abort_after: int | None = None
    pinned: int | None = None


@dataclass(frozen=True)
class Answer:
    """Tokens, and for each the log-probabilities of itself and of the `TOP` best tokens, by token id."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


Answers = dict[str, Answer]


def mixed_requests(count: int, seeded: bool, rng_seed: int = 1) -> list[ScriptedRequest]:
    """Short and long prompts, some with a common prefix; with `seeded` some sample with a seed; some are aborted."""
    rng = random.Random(rng_seed)
    shared = [rng.randrange(3, 4000) for _ in range(900)]
    jobs = []
    for number in range(count):
        tail = [rng.randrange(3, 4000) for _ in range(rng.choice((7, 60, 250, 700)))]
        prompt = shared[: rng.choice((0, 260, 900))] + tail
        kind = number % 5
        samples = seeded and kind == 1
        jobs.append(
            ScriptedRequest(
                name=f"job-{number}",
                step=2 * number,
                prompt=tuple(prompt),
                max_tokens=rng.randint(30, 80),
                temperature=0.9 if samples else 0.0,
                seed=number if samples else None,
                abort_after=rng.randint(1, 10) if kind == 4 else None,
            )
        )
    return jobs


def beside_requests() -> list[ScriptedRequest]:
    """Two streams, and two long prompts that come while they decode."""
    streams = [ScriptedRequest(f"stream-{n}", 0, (11 + n,) * 40, 90) for n in range(2)]
    prompts = [tuple((n * 977 + i * 31) % 3900 + 5 for i in range(1100)) for n in range(2)]
    return [*streams, *(ScriptedRequest(f"cold-{n}", 6, prompt, 12) for n, prompt in enumerate(prompts))]


def pinned_requests(jobs: Sequence[ScriptedRequest]) -> list[ScriptedRequest]:
    """The same requests with pinned answers, each of a token of its own."""
    return [replace(job, name=f"pinned-{job.name}", pinned=5 + 131 * number) for number, job in enumerate(jobs)]


def run_requests(
    engine: Any,
    jobs: Sequence[ScriptedRequest],
    prefix: str = "",
    before_step: Callable[[int], None] = lambda step: None,
) -> Answers:
    """Feeds the jobs to an `LLMEngine` until none is left; aborted ones answer with what they had.

    Args:
        prefix: of the request ids, so that the same jobs can run twice.
        before_step: called with the number of every step before it.
    """
    from vllm import SamplingParams

    todo = sorted(jobs, key=lambda job: job.step)
    by_name = {prefix + job.name: job for job in jobs}
    answers: Answers = {}
    step = 0
    while todo or engine.has_unfinished_requests():
        while todo and todo[0].step <= step:
            job = todo.pop(0)
            parameters = SamplingParams(
                max_tokens=job.max_tokens,
                temperature=job.temperature,
                seed=job.seed,
                ignore_eos=True,
                logprobs=TOP,
                detokenize=False,
                allowed_token_ids=None if job.pinned is None else [job.pinned],
            )
            engine.add_request(prefix + job.name, {"prompt_token_ids": list(job.prompt)}, parameters)
        before_step(step)
        for output in engine.step():
            job, completion = by_name[output.request_id], output.outputs[0]
            positions = [{token: one.logprob for token, one in each.items()} for each in completion.logprobs or []]
            answers[job.name] = Answer(list(completion.token_ids), positions)
            if job.abort_after is not None and len(completion.token_ids) >= job.abort_after and not output.finished:
                engine.abort_request([output.request_id])
        step += 1
    return answers


def to_json(answers: Answers) -> dict[str, Any]:
    return {name: asdict(answer) for name, answer in answers.items()}


def from_json(data: Mapping[str, Any]) -> Answers:
    """The inverse of `to_json` after a trip through JSON, which makes strings of token ids that are keys."""
    return {
        name: Answer(one["tokens"], [{int(token): value for token, value in each.items()} for each in one["logprobs"]])
        for name, one in data.items()
    }
