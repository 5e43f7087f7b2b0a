"""An episode of the torture rig: agents' requests drawn from a seed, and what happens to the engine meanwhile.

Everything is plain data, so that a failing episode can be cut down, written to a file and run again.
"""

import json
import random
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.support.mix import SCHEMA

VOCABULARY = 4000
BLOCK = 32
"""Tokens of a KV block, the fewest that vLLM's CPU backend has: so that a block is full in nearly every step."""
SHARED_TEXTS = 3
"""Prefixes that requests have in common."""
SHARED_TOKENS = 1100
MAX_PROMPT = 2600
KINDS = ("greedy", "logprobs", "seeded", "penalties", "structured", "twice", "stop")
EVENTS = ("reset", "reset_running", "pause", "kill_lane", "burst")


@dataclass(frozen=True)
class Request:
    """One request.

    A request that follows another starts `step` engine steps after the other's end, with the other's prompt and answer less
    the last `cut` tokens (a fork) and with one token in the middle changed if `edited`. One that is `beside` the other starts
    `step` steps after the other did, 0 is in the same step, and has the other's prompt only. Others start at `step`.
    """

    name: str
    step: int
    kind: str
    max_tokens: int
    shared: int = 0
    text: int = 0
    """Which of the shared texts it begins with `shared` tokens of."""
    tail: int = 50
    """Fresh tokens at the end."""
    follows: str | None = None
    beside: bool = False
    cut: int = 0
    edited: bool = False
    abort_after: int | None = None
    """Tokens after which its client goes away; 0: one step after it came."""
    session: str | None = None
    hints: dict[str, Any] = field(default_factory=dict)
    adapter: int = 0
    """Which LoRA adapter it is for; 0 is the model itself."""

    def parameters(self) -> SamplingParams:
        given: dict[str, Any] = {"max_tokens": self.max_tokens, "ignore_eos": True, "temperature": 0.0, "logprobs": 2}
        match self.kind:
            case "logprobs":
                given |= {"logprobs": 5}
            case "seeded":
                given |= {"temperature": 0.9, "top_p": 0.9, "seed": len(self.name) + self.tail}
            case "penalties":
                given |= {"repetition_penalty": 1.2, "presence_penalty": 0.3}
            case "structured":
                given |= {
                    "structured_outputs": StructuredOutputsParams(json=SCHEMA),
                    "ignore_eos": False,
                    "max_tokens": 120,
                }
            case "twice":
                given |= {"n": 2, "temperature": 0.8, "seed": self.tail}
            case "stop":
                given |= {"stop": ["e", "a"], "repetition_penalty": 1.3}
        return SamplingParams(**given, extra_args=dict(self.hints) or None)


@dataclass(frozen=True)
class Event:
    """What happens at `step`: `pause` lasts `length` steps."""

    step: int
    kind: str
    length: int = 0


@dataclass(frozen=True)
class Episode:
    """`mode`, `policy` and the rest of `options` are the scheduler's; with `adapters` the engine serves LoRA."""

    seed: int
    options: dict[str, Any]
    requests: tuple[Request, ...]
    events: tuple[Event, ...] = ()
    adapters: int = 0

    def write(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def read(text: str) -> "Episode":
        given = json.loads(text)
        requests = tuple(Request(**one) for one in given.pop("requests"))
        return Episode(**{**given, "requests": requests, "events": tuple(Event(**one) for one in given["events"])})

    def undisturbed(self) -> "Episode":
        """The same requests with patient clients and nothing happening: what stock vLLM is asked."""
        return replace(self, requests=tuple(replace(one, abort_after=None) for one in self.requests), events=())


def draw(seed: int, options: dict[str, Any], requests: int = 28, adapters: int = 0) -> Episode:
    """An episode of single calls, chains, forks, edited histories and prompts that go on from one still being read, with
    impatient clients and a few events; every chain stays with one of so many adapters."""
    rng = random.Random(seed)
    choice = random.Random(f"{seed} adapters")
    drawn: list[Request] = []
    prompts: dict[str, int] = {}
    lengths: dict[str, int] = {}
    step = 0
    for number in range(requests):
        name = f"r{number}"
        step += rng.choice((0, 0, 1, 3, 12))
        kind = rng.choice(KINDS)
        tail, max_tokens = rng.choice((rng.randint(4, 260), near_border(rng, 256))), rng.randint(3, 70)
        hints: dict[str, Any] = {}
        if rng.random() < 0.3:
            hints = {
                "agent_class": rng.choice(("interactive", "batch", "no such class")),
                "agent_deadline_ms": rng.choice((1, 5000, -3)),
                "agent_thread": rng.choice(("a", "b", "x" * 1000)),
            }
        session = rng.choice((None, None, f"s{seed}-{rng.randint(0, 4)}"))
        abort_after = rng.choice((0, 1, 5, 20)) if rng.random() < 0.25 else None
        parents = [one for one in drawn if one.abort_after is None and one.kind != "twice"]
        begin: dict[str, Any] = {
            "shared": rng.choice((0, 0, 300, 700, SHARED_TOKENS, near_border(rng, 512))),
            "text": rng.randrange(SHARED_TEXTS),
            "adapter": choice.randint(1, adapters) if adapters else 0,
        }
        length, at = begin["shared"] + tail, step
        if drawn and rng.random() < 0.25:
            parent = rng.choice(drawn[-4:])
            if prompts[parent.name] + tail <= MAX_PROMPT:
                cut = rng.choice((0, 0, 1, near_border(rng, 64)))
                begin = {"follows": parent.name, "beside": True, "cut": cut, "adapter": parent.adapter}
                length, at = prompts[parent.name] + tail, rng.choice((0, 0, 1, 2, 6))
        elif parents and rng.random() < 0.45:
            parent = rng.choice(parents)
            if lengths[parent.name] + tail <= MAX_PROMPT:
                cut, edited = rng.choice((0, 0, 0, 2, 90)), rng.random() < 0.15
                begin = {"follows": parent.name, "cut": cut, "edited": edited, "adapter": parent.adapter}
                length, at = lengths[parent.name] + tail, rng.randint(0, 9)
        prompts[name], lengths[name] = length, length + max_tokens
        common = {"tail": tail, "abort_after": abort_after, "session": session, "hints": hints}
        drawn.append(Request(name, at, kind, max_tokens, **common, **begin))
    events = [Event(rng.randint(3, 120), rng.choice(EVENTS[:-1]), rng.randint(1, 12)) for _ in range(rng.randint(0, 4))]
    if rng.random() < 0.3:
        at = rng.randint(2, 60)
        drawn = [replace(one, step=at) if one.follows is None and rng.random() < 0.7 else one for one in drawn]
        events.append(Event(at, "burst"))
    return Episode(seed, options, tuple(drawn), tuple(sorted(events, key=lambda event: event.step)), adapters)


def near_border(rng: random.Random, most: int) -> int:
    """A number of tokens at which blocks and chunks end, or one more or less."""
    return rng.randint(1, most // BLOCK) * BLOCK + rng.choice((-1, 0, 1))


def fresh_tokens(key: str, count: int) -> list[int]:
    rng = random.Random(key)
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


def prompt_of(episode: Episode, request: Request, context: list[int]) -> list[int]:
    """Token ids of a request's prompt; `context` are those it goes on from, if it does."""
    if request.follows is None:
        begin = fresh_tokens(f"{episode.seed} text {request.text}", SHARED_TOKENS)[: request.shared]
    else:
        begin = context[: len(context) - request.cut] if request.cut < len(context) else context
        if request.edited:
            begin = [*begin]
            begin[len(begin) // 2] = 3 + (begin[len(begin) // 2] + 1) % (VOCABULARY - 3)
    return begin + fresh_tokens(f"{episode.seed} {request.name}", request.tail)
