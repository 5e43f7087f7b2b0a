"""Requests that come at given steps of an engine, fed to it step by step, and what it answered."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

TOP = 5
"""Log-probabilities kept per position beside the chosen token's."""


@dataclass(frozen=True)
class ScriptedRequest:
    """One request.

    Args:
        step: engine step before which it comes.
        parameters: arguments of vLLM's `SamplingParams`.
        abort_after: its client goes away after so many tokens; 0: in the step with which it came.
    """

    name: str
    step: int
    prompt: Sequence[int]
    parameters: Mapping[str, Any]
    abort_after: int | None = None


@dataclass(frozen=True)
class Answer:
    """Tokens, and for each the log-probabilities of itself and of the best tokens that were asked for, by token id.

    Args:
        text: empty where the engine has no tokenizer.
        stop_reason: as vLLM gives it.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]
    text: str = ""
    stop_reason: Any = None


Answers = dict[str, Answer]
"""By request: the first answer of each."""
Completions = dict[str, dict[int, Answer]]
"""By request, and by index of the answer: requests may ask for several."""


def greedy(max_tokens: int, **more: Any) -> dict[str, Any]:
    """Parameters of a greedy answer of exactly so many tokens, with log-probabilities."""
    return {
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "logprobs": TOP,
        "detokenize": False,
    } | more


def long_prompt(number: int, tokens: int) -> list[int]:
    """A prompt of so many tokens; those of two numbers have no beginning in common."""
    return [(number * 977 + i * 31) % 3900 + 5 for i in range(tokens)]


def mixed_requests(count: int, seeded: bool, rng_seed: int = 1) -> list[ScriptedRequest]:
    """Short and long prompts, some with a common prefix; with `seeded` some sample with a seed; some are aborted."""
    rng = random.Random(rng_seed)
    shared = [rng.randrange(3, 4000) for _ in range(900)]
    requests = []
    for number in range(count):
        tail = [rng.randrange(3, 4000) for _ in range(rng.choice((7, 60, 250, 700)))]
        prompt = shared[: rng.choice((0, 260, 900))] + tail
        kind = number % 5
        samples = seeded and kind == 1
        parameters = greedy(rng.randint(30, 80), **({"temperature": 0.9, "seed": number} if samples else {}))
        abort_after = rng.randint(1, 10) if kind == 4 else None
        requests.append(ScriptedRequest(f"request-{number}", 2 * number, tuple(prompt), parameters, abort_after))
    return requests


def beside_requests() -> list[ScriptedRequest]:
    """Two streams, and two long prompts that come while they decode."""
    streams = [ScriptedRequest(f"stream-{n}", 0, [11 + n] * 40, greedy(90)) for n in range(2)]
    return [*streams, *(ScriptedRequest(f"cold-{n}", 6, long_prompt(n, 1100), greedy(12)) for n in range(2))]


def pinned_requests(requests: Sequence[ScriptedRequest]) -> list[ScriptedRequest]:
    """The same requests with pinned answers: every token of an answer has to be one token, another one for each request. So every
    run has the same context at every position; the log-probabilities are those of the free choice all the same."""
    return [
        replace(one, name=f"pinned-{one.name}", parameters={**one.parameters, "allowed_token_ids": [5 + 131 * number]})
        for number, one in enumerate(requests)
    ]


def run_requests(
    engine: Any,
    requests: Sequence[ScriptedRequest],
    prefix: str = "",
    before_step: Callable[[int], None] = lambda step: None,
) -> Completions:
    """Feeds the requests to an `LLMEngine`, step by step, until none is left; aborted ones answer with what they had.

    Args:
        prefix: of the request ids, so that the same requests can run twice.
        before_step: called with the number of every step before its requests come.
    """
    from vllm import SamplingParams

    todo = sorted(requests, key=lambda request: request.step)
    by_id = {prefix + request.name: request for request in requests}
    found: Completions = {}
    step = 0
    while todo or engine.has_unfinished_requests():
        before_step(step)
        leaving = []
        while todo and todo[0].step <= step:
            request = todo.pop(0)
            found[request.name] = {}
            parameters = SamplingParams(**request.parameters)
            engine.add_request(prefix + request.name, {"prompt_token_ids": list(request.prompt)}, parameters)
            if request.abort_after == 0:
                leaving.append(prefix + request.name)
        for output in engine.step():
            request = by_id[output.request_id]
            found[request.name] |= completions(output)
            came = len(output.outputs[0].token_ids)
            if request.abort_after and came >= request.abort_after and not output.finished:
                leaving.append(output.request_id)
        if leaving:
            engine.abort_request(leaving)
        step += 1
    return found


def completions(output: Any) -> dict[int, Answer]:
    """What a `RequestOutput` holds, by index of the answer."""
    return {
        one.index: Answer(
            list(one.token_ids),
            [{token: entry.logprob for token, entry in position.items()} for position in one.logprobs or []],
            one.text,
            one.stop_reason,
        )
        for one in output.outputs
    }


def first_answers(found: Completions) -> Answers:
    """The first answer of every request that has one."""
    return {name: answers[0] for name, answers in found.items() if 0 in answers}


def to_json(answers: Answers) -> dict[str, Any]:
    """Tokens and log-probabilities; neither texts nor reasons to stop, which the check's engines do not give."""
    return {name: {"tokens": one.tokens, "logprobs": one.logprobs} for name, one in answers.items()}


def from_json(data: Mapping[str, Any]) -> Answers:
    """The inverse of `to_json` after a trip through JSON, which makes strings of token ids that are keys."""
    return {
        name: Answer(one["tokens"], [{int(token): value for token, value in each.items()} for each in one["logprobs"]])
        for name, one in data.items()
    }
