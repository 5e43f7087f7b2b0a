"""Load control driven as a scheduler would, without an engine: who comes, begins and ends, on a clock of the test's."""

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_agentserve.policy.claims import LoadCall
from vllm_agentserve.policy.load import LoadControl
from vllm_agentserve.policy.tier import Tier

BEGAN = 5
"""Programs that `fill` lets begin after `learn`."""


@dataclass(frozen=True)
class Measured:
    """Host memory from which a token comes back in that time."""

    host_tokens: int
    token_ms: float

    def restore_ms(self, tokens: int) -> float | None:
        return self.token_ms * tokens


class Server:
    """Tells load control of calls."""

    def __init__(
        self,
        pool_tokens: int = 10_000,
        max_hold_s: float = 600.0,
        block_tokens: int = 16,
        host: Tier | None = None,
    ) -> None:
        self.load = LoadControl(pool_tokens, block_tokens, max_hold_s, host)
        self.now = 0.0
        self.read_s = 0.2
        """Seconds to read a thousand tokens."""
        self.calls: dict[str, LoadCall] = {}

    def arrive(self, call: str, program: str, prompt: int = 1000, **more: object) -> None:
        self.calls[call] = self.load.arrive(program, self.now, prompt, **more)  # type: ignore[arg-type]

    def may(self, call: str, idle: bool = False) -> bool:
        return self.load.may_begin(self.calls[call], self.now, idle=idle)

    def begin(self, call: str, cached: int = 0) -> None:
        self.load.begin(self.calls[call], self.now, cached)

    def abort(self, call: str) -> None:
        self.load.abort(self.calls[call], self.now)

    def faults(self, names: Iterable[str] | None = None) -> list[str]:
        """What does not agree where these are the calls there are; without names, all that ever came."""
        known = self.calls if names is None else names
        return self.load.faults({self.calls[name] for name in known})

    def end(
        self, call: str, answer: int = 50, last: bool = False, tool: str | None = None, child: bool = False
    ) -> None:
        one = self.calls[call]
        self.load.end(
            one,
            self.now,
            one.prompt_tokens + answer,
            read_s=self.read_s,
            read_tokens=1000,
            decode_s=0.3,
            last=last,
            tool=tool,
            child=child,
        )

    def turn(
        self, call: str, program: str, prompt: int = 1000, cached: int = 0, last: bool = False, **more: object
    ) -> None:
        self.arrive(call, program, prompt, **more)
        assert self.may(call, idle=True)
        self.begin(call, cached)
        self.end(call, last=last)

    def learn(
        self,
        programs: int = 10,
        turns: int = 4,
        gap_s: float = 1.0,
        named: bool = True,
        ends: bool = True,
        other_gap_s: float | None = None,
    ) -> None:
        """Programs one after the other, which come back after a second each time: growth 150, 100 new tokens a turn."""
        for index in range(programs):
            for turn in range(turns):
                name = f"old-{named}-{index}"
                prompt = 1000 + 150 * turn
                self.turn(f"{name}/{turn}", name, prompt, max(prompt - 100, 0), ends and turn == turns - 1, named=named)
                self.now += gap_s if other_gap_s is None or turn % 2 else other_gap_s
        self.now += 100.0


def learned(**more: object) -> Server:
    server = Server(**more)  # type: ignore[arg-type]
    server.learn()
    return server


def fill(server: Server, number: int = 30, **more: object) -> list[str]:
    """So many first calls come at once; returns those that are held, the others have begun."""
    calls = [f"new-{index}/0" for index in range(number)]
    for index, call in enumerate(calls):
        server.arrive(call, f"new-{index}", **more)
    held = []
    for call in calls:
        if server.may(call):
            server.begin(call)
        else:
            held.append(call)
    return held
