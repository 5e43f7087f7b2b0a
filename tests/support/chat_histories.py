"""Agents whose histories a chat template writes anew, and how well `Attribution` tells them apart without hints.

Run as a program, it prints the table of docs/results/field-sessions.md. The templates have the shape of those in use: Qwen's,
which leaves out the reasoning of answers before the last question and opens the reasoning itself or closes it at once, and the
tool calls of Hermes, which a template writes with other spaces and keys in another order than the model did.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jinja2 import Environment
from tokenizers import Tokenizer

from tests.support.sequences import hashes
from vllm_agentserve.policy.attribution import Attribution
from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.rewritten import RewrittenHistories
from vllm_agentserve.toy import write_tokenizer

HEAD = """\
<|im_start|>system
{{ system }}

# Tools
{"name": "search", "parameters": {"query": "string", "limit": "integer"}}
{"name": "read_file", "parameters": {"path": "string", "first": "integer", "last": "integer"}}<|im_end|>
"""
CALL = """\
{%- if message.call %}<tool_call>
{"name": "{{ message.call.name }}", "arguments": {{ message.call.arguments | tojson }}}
</tool_call>{% endif %}"""
QWEN = (
    HEAD
    + """\
{%- set last = namespace(question=0) %}
{%- for message in messages %}{% if message.role == "user" %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == "assistant" %}{% if loop.index0 > last.question and message.reasoning %}<think>
{{ message.reasoning }}
</think>

{% endif %}{{ message.content }}"""
    + CALL
    + """\
{% elif message.role == "tool" %}<tool_response>
{{ message.content }}
</tool_response>{% else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
)
HERMES = (
    HEAD
    + """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}"""
    + """\
{%- if message.call %}
<tool_call>
{"arguments": {{ message.call.arguments | tojson }}, "name": "{{ message.call.name }}"}
</tool_call>{% endif %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
)
HERMES_SILENT = HERMES.replace("{{ message.content }}", "{% if not message.call %}{{ message.content }}{% endif %}")


@dataclass(frozen=True)
class Template:
    """A chat template, and what its model writes.

    Args:
        text: in jinja.
        opens: what the prompt ends with after the name of the assistant, and no history repeats.
        reasons: whether answers begin with reasoning.
        loud: whether the client sends the reasoning back at all.
        odd: whether the model writes tokens that no tokenizer gives for the text, as a grammar may make it do.
    """

    text: str
    opens: str = ""
    reasons: bool = True
    loud: bool = True
    odd: bool = False


TEMPLATES = {
    "Qwen, reasoning left out before the last question": Template(QWEN),
    "Qwen, the prompt opens the reasoning": Template(QWEN, opens="<think>\n"),
    "Qwen, the prompt closes the reasoning at once": Template(QWEN, opens="<think>\n\n</think>\n\n", reasons=False),
    "Qwen, the client sends no reasoning back": Template(QWEN, loud=False),
    "Hermes, tool calls written anew": Template(HERMES, reasons=False),
    "Hermes, tool calls written anew, reasoning left out": Template(HERMES),
    "Hermes, words beside a tool call left out": Template(HERMES_SILENT, reasons=False),
    "Hermes, answers in other tokens than their text has": Template(HERMES, reasons=False, odd=True),
}
END = "<|im_end|>"
MIXES = ("shared system prompt", "forks", "identical prompts")


@dataclass
class Agent:
    """One agent under way.

    Args:
        name: of its program.
        rng: what it says.
        messages: so far.
        left: calls it still makes.
        forks: whether it starts a second thread from its context once.
    """

    name: str
    rng: random.Random
    messages: list[dict[str, Any]]
    left: int
    forks: bool = False
    loud: bool = True


@dataclass
class Seen:
    """(true program, inferred program) per request, and how many of the later calls of a program were put to it."""

    pairs: list[tuple[str, str]] = field(default_factory=list)
    later: int = 0
    found: int = 0


def words(rng: random.Random, count: int) -> str:
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ar", "en")]
    return " ".join("".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(count))


def answer_of(template: Template, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """What the model writes after the prompt, and the message that the client makes of it."""
    reasoning = "Okay, let me see. " + words(rng, rng.randint(5, 40))
    content = words(rng, rng.randint(3, 30)) if rng.random() < 0.6 else ""
    call = None
    if not content or rng.random() < 0.7:
        if rng.random() < 0.5:
            call = {"name": "search", "arguments": {"query": words(rng, 3), "limit": rng.randint(1, 20)}}
        else:
            call = {"name": "read_file", "arguments": {"path": words(rng, 1), "first": 1, "last": rng.randint(2, 999)}}
    text = content
    if call is not None:
        text += ("\n" if content else "") + f"<tool_call>\n{json.dumps(call, separators=(',', ':'))}\n</tool_call>"
    if template.reasons:
        text = ("" if template.opens else "<think>\n") + f"{reasoning}\n</think>\n\n{text}"
    message = {"role": "assistant", "reasoning": reasoning, "content": content, "call": call}
    return text + END, message | ({} if template.reasons and template.loud else {"reasoning": ""})


class Replay:
    """Serves agents in turns, without hints, and notes whose their calls are taken to be."""

    def __init__(self, tokenizer: Tokenizer, template: Template, block: int) -> None:
        self.tokens: Callable[[str], list[int]] = lambda text: list(tokenizer.encode(text).ids)
        self.template, self.block = template, block
        self.writer = Environment(keep_trailing_newline=True).from_string(template.text)
        self.attribution, self.seen, self.number = Attribution(block), Seen(), 0
        self.owners: dict[str, Counter[str]] = {}

    def answered(self, text: str) -> list[int]:
        """The tokens of an answer."""
        if not self.template.odd:
            return self.tokens(text)
        words = text.removesuffix(END)
        return [token for letter in words for token in self.tokens(letter)] + self.tokens(END)

    def call(self, agent: Agent, system: str) -> None:
        prompt = self.tokens(self.writer.render(system=system, messages=agent.messages) + self.template.opens)
        text, message = answer_of(self.template, agent.rng)
        every = prompt + self.answered(text)
        self.number += 1
        request = SimpleNamespace(
            request_id=f"{self.number}",
            session_id=None,
            prompt_token_ids=prompt,
            block_hashes=hashes(prompt, self.block),
            all_token_ids=every,
            num_prompt_tokens=len(prompt),
            num_output_tokens=len(every) - len(prompt),
        )
        call = Call(request)
        call.owner = self.attribution.owner(call)
        request.block_hashes = hashes(every, self.block)
        self.attribution.remember(call, 0.0, self.number)
        self.seen.pairs.append((agent.name, call.owner.key))
        known = self.owners.setdefault(agent.name, Counter())
        if known:
            self.seen.later += 1
            self.seen.found += call.owner.key in known
        known[call.owner.key] += 1
        agent.messages.append(message)
        if message["call"] is not None:
            agent.messages.append({"role": "tool", "content": words(agent.rng, agent.rng.randint(5, 60))})
        else:
            agent.messages.append({"role": "user", "content": words(agent.rng, agent.rng.randint(3, 20))})


def replay(
    tokenizer: Tokenizer, template: Template, mix: str, block: int = 16, seed: int = 1, exact: bool = False
) -> Seen:
    """Twenty-four agents with one system prompt, a call each in turns; `exact` leaves out what was written anew."""
    rng = random.Random(seed)
    system, serving = words(rng, 60), Replay(tokenizer, template, block)
    if exact:
        serving.attribution._rewritten = RewrittenHistories(block, capacity=0)
    going = []
    for number in range(24):
        task = number // 4 if mix == "identical prompts" else number
        question = {"role": "user", "content": words(random.Random(f"task {seed} {task}"), 25)}
        own = random.Random(f"agent {seed} {number}")
        going.append(Agent(f"agent {number}", own, [question], own.randint(3, 10), mix == "forks"))
    while going:
        agent = going.pop(rng.randrange(min(len(going), 12)))
        serving.call(agent, system)
        agent.left -= 1
        if agent.forks and agent.left == 3:
            other = random.Random(f"{agent.name} fork")
            going.append(Agent(agent.name, other, [*agent.messages[:-1], fresh(agent, other)], 3))
        if agent.left:
            going.append(agent)
    return serving.seen


def fresh(agent: Agent, rng: random.Random) -> dict[str, Any]:
    """Another last message than the agent's own."""
    return {"role": agent.messages[-1]["role"], "content": words(rng, 15)}


def precision_and_recall(pairs: list[tuple[str, str]]) -> tuple[float, float]:
    """Over pairs of requests: how many put together belong together, and how many that do are."""

    def together(clusters: "Counter[Any]") -> int:
        return sum(count * (count - 1) // 2 for count in clusters.values())

    right = together(Counter(pairs))
    inferred, true = Counter(found for _, found in pairs), Counter(name for name, _ in pairs)
    return right / max(together(inferred), 1), right / max(together(true), 1)


def toy_tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), 0)
        return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how often agents are drawn")
    parser.add_argument("--exact", action="store_true", help="without the rule for histories that were written anew")
    given = parser.parse_args()
    tokenizer = toy_tokenizer()
    print("| template | prompts | block | calls | precision | recall | later calls found |")
    print("|---|---|---|---|---|---|---|")
    for name, template in TEMPLATES.items():
        for mix in MIXES:
            for block in (16, 128):
                seens = [
                    replay(tokenizer, template, mix, block, seed, given.exact) for seed in range(1, given.seeds + 1)
                ]
                pairs = [(f"{n} {a}", f"{n} {b}") for n, seen in enumerate(seens) for a, b in seen.pairs]
                precision, recall = precision_and_recall(pairs)
                found = sum(seen.found for seen in seens) / sum(seen.later for seen in seens)
                print(
                    f"| {name} | {mix} | {block} | {len(pairs)} | {precision:.3f} | {recall:.3f} | {found:.1%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
