"""Crowds: episodes of many short requests that have prefixes in common and come in the same steps, and a model small enough for
twenty thousand of them."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any
from unittest import mock

from tests.torture.episode import BLOCK, Episode, Event, Request, near_border
from vllm_agentserve import toy

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""What of the toy model is made smaller: a token is a twentieth of the work."""
SMALL_COMMON_LENGTH = 1.0
"""What all tokens have in common, as long as what is a token's own: a wrong token of the context is felt by all that follow."""
OPTIONS = {
    "mode": "lanes",
    "policy": "fcfs",
    "tpot_slo_ms": 30,
    "lane_min_tokens": 48,
    "lane_chunk_tokens": 64,
    "lane_max_requests": 4,
    "lane_restarts": 1000,
    "first_chunk_tokens": 16,
}
PAUSE_STEPS = 6


def small_model() -> Path:
    """The folder of the toy model with `SMALL`; made first where it is not there yet, in 5 s."""
    recipe = json.dumps([SMALL, SMALL_COMMON_LENGTH], sort_keys=True)
    folder = toy.cache_folder() / f"small-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    with mock.patch.dict(toy.CONFIG, SMALL), mock.patch.object(toy, "COMMON_LENGTH", SMALL_COMMON_LENGTH):
        return toy.make_toy_model(folder)


def draw_crowd(seed: int, requests: int = 200, options: dict[str, Any] | None = None) -> Episode:
    """An episode in which groups come: a request that begins with one of the shared texts, too short for the lane or not, and
    others that go on from its prompt, in the same step or while it is read. Some follow answers, some clients leave."""
    rng = random.Random(f"{seed} crowd")
    drawn: list[Request] = []
    step = 0
    while len(drawn) < requests:
        step += rng.choice((1, 1, 2, 3, 5, 8))
        first = one(
            rng, drawn, step=step, shared=near_border(rng, 320), text=rng.randrange(3), tail=rng.choice((8, 40, 100))
        )
        drawn.append(first)
        for _ in range(rng.choice((0, 1, 2, 2, 3, 5))):
            beside = rng.choice((first, first, drawn[-1]))
            cut = rng.choice((0, 0, 1, near_border(rng, 2 * BLOCK)))
            drawn.append(
                one(rng, drawn, step=rng.choice((0, 0, 0, 1, 2, 4)), follows=beside.name, beside=True, cut=cut)
            )
        answered = [each for each in drawn[-8:] if each.abort_after is None]
        if answered and rng.random() < 0.3:
            drawn.append(one(rng, drawn, step=rng.randint(0, 3), follows=rng.choice(answered).name))
    events = [
        Event(
            rng.randint(3, step), rng.choice(("reset", "reset", "reset_running", "pause")), rng.randint(1, PAUSE_STEPS)
        )
        for _ in range(rng.randint(1, 5))
    ]
    return Episode(seed, options or OPTIONS, tuple(drawn), tuple(sorted(events, key=lambda event: event.step)))


def one(rng: random.Random, drawn: list[Request], **given: Any) -> Request:
    """The next request: greedy, a few tokens of prompt of its own, a few tokens of answer."""
    common = {
        "tail": rng.choice((rng.randint(1, 30), rng.randint(48, 160), near_border(rng, 160))),
        "max_tokens": rng.randint(2, 24),
        "abort_after": rng.choice((0, 1, 3)) if rng.random() < 0.06 else None,
        "session": f"s{rng.randint(0, 9)}" if rng.random() < 0.3 else None,
    }
    return Request(f"r{len(drawn)}", kind="greedy", **(common | given))
