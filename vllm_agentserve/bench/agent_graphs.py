"""Programs of several agents after those of Tokencake (arXiv 2510.18586): parents wait for sub-agents, tools differ in length.

What is public: the graph of its code writer has 27 calls, 13 of them instructions for tools with 128 tokens of answer, and 6,464
tokens of answers in all (tools/tokencake_experiments/reports/component-methodology.md in its repository). The division into
agents, and all other lengths and tools, are our assumption. Sub-agents begin with the context of the agent that starts them.
"""

import random
from dataclasses import dataclass, field

from vllm_agentserve.bench.calls import CallShape


@dataclass(frozen=True)
class Tool:
    """A tool.

    Args:
        low_s, high_s: what it takes, drawn evenly.
        low, high: tokens of its result, drawn evenly.
    """

    low_s: float
    high_s: float
    low: int
    high: int


FILES = Tool(0.05, 0.3, 100, 600)
TESTS = Tool(2.0, 10.0, 200, 800)
REPOSITORY = Tool(0.3, 1.5, 50, 200)
SEARCH = Tool(1.0, 4.0, 400, 1200)
PAGE = Tool(0.5, 5.0, 800, 2400)
INSTRUCTION = 128
"""Tokens of an answer that only calls a tool."""


@dataclass
class Graph:
    """The calls of a program while it is drawn."""

    rng: random.Random
    calls: list[CallShape] = field(default_factory=list)

    def begin(self, prompt: tuple[int, int], answer: tuple[int, int]) -> int:
        """The first call; returns its index, as all of these do."""
        self.calls.append(CallShape(self.rng.randint(*prompt), 0, self.rng.randint(*answer)))
        return len(self.calls) - 1

    def turn(self, before: int, tool: Tool, answer: tuple[int, int]) -> int:
        """The next call of an agent, with the result of a tool."""
        return self.go_on(
            before, self.rng.randint(tool.low, tool.high), answer, self.rng.uniform(tool.low_s, tool.high_s)
        )

    def go_on(self, before: int, added: int, answer: tuple[int, int], tool_s: float = 0.0) -> int:
        """A call that goes on from the context of an earlier one: the next of an agent, or the first of a sub-agent."""
        self.calls.append(CallShape(added, self._context(before), self.rng.randint(*answer), tool_s, (before,)))
        return len(self.calls) - 1

    def join(self, start: int, ends: list[int], answer: tuple[int, int]) -> int:
        """The call of a parent after all of its sub-agents: it goes on from its own context, with their last answers."""
        added = sum(self.calls[end].output for end in ends)
        self.calls.append(CallShape(added, self._context(start), self.rng.randint(*answer), 0.0, tuple(ends)))
        return len(self.calls) - 1

    def _context(self, before: int) -> int:
        call = self.calls[before]
        return call.context + call.uncached + call.output


def code_writer(rng: random.Random) -> tuple[CallShape, ...]:
    """A plan, coders beside each other that write, test and mend their files, then reviews and a commit."""
    graph = Graph(rng)
    plan = graph.turn(graph.begin((1500, 2500), (INSTRUCTION, INSTRUCTION)), FILES, (500, 700))
    ends = []
    for _ in range(rng.randint(3, 5)):
        coder = graph.go_on(plan, rng.randint(60, 200), (INSTRUCTION, INSTRUCTION))
        coder = graph.turn(coder, FILES, (400, 800))
        for _ in range(rng.randint(1, 3)):
            coder = graph.turn(coder, TESTS, (INSTRUCTION, 300))
        ends.append(graph.turn(coder, FILES, (150, 300)))
    review = graph.join(plan, ends, (200, 400))
    reviewers = []
    for _ in range(2):
        reviewer = graph.go_on(review, rng.randint(60, 120), (INSTRUCTION, INSTRUCTION))
        reviewers.append(graph.turn(reviewer, TESTS, (150, 300)))
    last = graph.join(review, reviewers, (INSTRUCTION, INSTRUCTION))
    graph.turn(last, REPOSITORY, (150, 300))
    return tuple(graph.calls)


def deep_research(rng: random.Random) -> tuple[CallShape, ...]:
    """A question that is divided among researchers, each of which searches and reads for some turns; one or two rounds of that,
    then a report that is written in parts."""
    graph = Graph(rng)
    lead = graph.begin((1000, 1800), (200, 400))
    for _ in range(rng.randint(1, 2)):
        ends = []
        for _ in range(rng.randint(3, 6)):
            researcher = graph.go_on(lead, rng.randint(40, 120), (60, INSTRUCTION))
            researcher = graph.turn(researcher, SEARCH, (60, INSTRUCTION))
            for _ in range(rng.randint(1, 4)):
                researcher = graph.turn(researcher, PAGE, (60, 200))
            ends.append(graph.turn(researcher, PAGE, (200, 500)))
        lead = graph.join(lead, ends, (200, 400))
    for _ in range(rng.randint(1, 3)):
        lead = graph.turn(lead, FILES, (300, 800))
    return tuple(graph.calls)
