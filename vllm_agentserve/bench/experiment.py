"""An experiment: arms in turns, round after round, one server at a time, everything written down as it happens."""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import uvloop

from vllm_agentserve.bench.arms import Arm
from vllm_agentserve.bench.client import StreamingClient
from vllm_agentserve.bench.conditions import Conditions, pollution
from vllm_agentserve.bench.endpoint import EndpointError, added, find_endpoint, kv_blocks, read_counters
from vllm_agentserve.bench.machine import describe_machine, shown
from vllm_agentserve.bench.progress import Progress
from vllm_agentserve.bench.records import Results, RoundRecord
from vllm_agentserve.bench.replay import Replay
from vllm_agentserve.bench.server import ServerError, VllmServer
from vllm_agentserve.bench.sessions import (
    Session,
    WorkloadError,
    alone_of,
    count_requests,
    longest_context,
    warm_up_of,
)

MARGIN_TOKENS = 64
BLOCKS_KEPT = 0.95
"""Share of the KV blocks a first start finds room for that every arm gets, where no size is given."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides what an experiment does.

    Args:
        sessions: the sessions of a round, by its number; asked often, so it should remember.
        workload: how they came about, for the report.
        model: model folder or name; not needed when all arms are servers of somebody else.
        serve: options of `vllm serve` for all arms.
        kv_bytes: size of the KV cache of every arm; None lets a first start find it.
        answers: see `Replay`.
        slo_factor: thresholds are the isolated run times this; 0 leaves the isolated run out.
        anonymous: see `Replay`.
    """

    arms: Sequence[Arm]
    sessions: Callable[[int], list[Session]]
    workload: dict[str, Any]
    model: str | None = None
    serve: tuple[str, ...] = ()
    kv_bytes: int | None = None
    port: int | None = None
    rounds: int = 3
    seed: int = 0
    answers: str = "pinned"
    slo_factor: float = 3.0
    anonymous: bool = False
    command: Sequence[str] = field(default_factory=tuple)

    @cached_property
    def context_tokens(self) -> int:
        """What the longest context of any round needs."""
        return max(longest_context(self.sessions(number)) for number in range(self.rounds)) + MARGIN_TOKENS

    def order(self, number: int) -> list[Arm]:
        """The arms of a round; each round begins with another one, so that none always follows the same."""
        first = number % len(self.arms)
        return [*self.arms[first:], *self.arms[:first]]


class Experiment:
    """Runs a plan and writes its results.

    Raises:
        ServerError, EndpointError, WorkloadError: from `run`, when an arm cannot be measured; what was measured before
            is kept.
    """

    def __init__(self, plan: Plan, folder: Path, progress: Progress) -> None:
        self.plan = plan
        self.progress = progress
        self.folder = folder
        self.options = self.serve_options()
        self.results = Results.create(folder, self.description())

    def serve_options(self) -> tuple[str, ...]:
        """What every server of ours gets, whatever the arm."""
        plan = self.plan
        options = list(plan.serve)
        if not any(option.split("=")[0] == "--max-model-len" for option in options):
            options += ["--max-model-len", str(-(-max(plan.context_tokens, 2048) // 256) * 256)]
        if plan.kv_bytes is not None:
            options += ["--kv-cache-memory-bytes", str(plan.kv_bytes)]
        return tuple(options)

    def server(self, arm: Arm, log: Path | None = None) -> VllmServer:
        if self.plan.model is None:
            raise WorkloadError(f"arm {arm.name!r} needs a server of ours, and so --model")
        return VllmServer(self.plan.model, [*self.options, *arm.options], port=self.plan.port, log=log)

    def description(self) -> dict[str, Any]:
        plan = self.plan
        arms = []
        for arm in plan.arms:
            command = None
            if arm.url is None:
                model = "MODEL" if plan.model is None else shown(plan.model)
                command = shlex.join(["vllm", "serve", model, *map(shown, (*self.options, *arm.options))])
            arms.append({"name": arm.name, "url": arm.url, "command": command, "settings": arm.settings})
        return {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "command": shlex.join(map(shown, plan.command)),
            "machine": describe_machine(),
            "arms": arms,
            "workload": plan.workload,
            "rounds": plan.rounds,
            "seed": plan.seed,
            "answers": plan.answers,
            "anonymous": plan.anonymous,
            "slo_factor": plan.slo_factor,
            "isolated_arm": self.isolated.name if plan.slo_factor else None,
            "requests_per_round": count_requests(plan.sessions(0)),
        }

    @property
    def isolated(self) -> Arm:
        """The arm whose server runs every session alone: stock where there is one."""
        return next((arm for arm in self.plan.arms if arm.name == "stock"), self.plan.arms[0])

    def run(self) -> None:
        plan = self.plan
        if plan.kv_bytes is None and not any("kv-cache" in one or "gpu-blocks" in one for one in self.options):
            self.size_kv_cache()
        per_round = [count_requests(plan.sessions(number)) for number in range(plan.rounds)]
        alone = [count_requests(alone_of(plan.sessions(n), "")) if plan.slo_factor else 0 for n in range(plan.rounds)]
        self.progress.begin(sum(per_round) * len(plan.arms) + sum(alone))
        for number in range(plan.rounds):
            for arm in plan.order(number):
                self.progress.say(f"round {number + 1}/{plan.rounds} · {arm.name}")
                self.run_arm(arm, number)

    def size_kv_cache(self) -> None:
        """On a GPU vLLM sizes the cache by what is left; other chunks leave other room. One size for all, found once."""
        arm = next((arm for arm in self.plan.arms if arm.url is None), None)
        if arm is None:
            return
        self.progress.say("finding a KV cache size that all arms can have")
        with self.server(arm, self.folder / "server-sizing.log") as server:
            found = kv_blocks(server.url)
        if found is None:
            raise ServerError("the server does not say how large its KV cache is: give the size with --kv-gib")
        self.options = (*self.options, "--num-gpu-blocks-override", str(int(found[0] * BLOCKS_KEPT)))

    def run_arm(self, arm: Arm, number: int) -> None:
        """One arm in one round: server, warm-up, the measured part, the isolated run; then everything is written."""
        record = RoundRecord(arm=arm.name, round=number, began=datetime.now(UTC).strftime("%H:%M:%S"))
        began = time.perf_counter()
        try:
            if arm.url is not None:
                self.measure(arm, number, record, arm.url, None)
                return
            name = "".join(c if c.isalnum() or c in "-=." else "_" for c in arm.name)
            with self.server(arm, self.folder / f"server-{number + 1}-{name}.log") as server:
                record.seconds["start"] = round(time.perf_counter() - began, 3)
                self.measure(arm, number, record, server.url, server)
        except KeyboardInterrupt:
            record.error = "interrupted"
            raise
        except Exception as error:
            record.error = str(error).splitlines()[0]
            raise
        finally:
            self.results.add_round(record)
            self.progress.note(in_one_line(record))

    def measure(self, arm: Arm, number: int, record: RoundRecord, url: str, server: VllmServer | None) -> None:
        endpoint = find_endpoint(url)
        record.software = endpoint.kind
        blocks = kv_blocks(url)
        record.kv_tokens = None if blocks is None else blocks[0] * blocks[1]
        if endpoint.max_model_len is not None and self.plan.context_tokens > endpoint.max_model_len:
            raise WorkloadError(
                f"arm {arm.name!r} has room for {endpoint.max_model_len} tokens, the workload needs {self.plan.context_tokens}: "
                f"use a smaller --scale"
            )
        sessions = self.plan.sessions(number)
        client = StreamingClient(url, endpoint.model, endpoint.extensions)
        parts = {"warm-up": warm_up_of(sessions, f"{self.plan.seed} {number}"), "measured": sessions}
        if self.plan.slo_factor and arm is self.isolated:
            parts["alone"] = alone_of(sessions, f"{self.plan.seed} {number}")
        for part, planned in parts.items():
            on_turn = self.progress.advance if part != "warm-up" else lambda: None
            replay = Replay(
                client, planned, arm.name, number, part, self.plan.answers, on_turn, anonymous=self.plan.anonymous
            )
            counted = read_counters(url)
            with Conditions() as conditions:
                try:
                    uvloop.run(in_session(replay))
                finally:
                    if part != "warm-up":
                        self.results.add(replay.records)
                    conditions.lateness_ms = replay.lateness_ms
            record.seconds[part] = round(replay.seconds, 6)
            self.check(arm, url, server, replay)
            if part == "measured":
                record.server = added(counted, read_counters(url))
                record.conditions = conditions.report()
                record.gpu = conditions.gpu.report(sum(len(one.stamps_us) for one in replay.records))
                record.polluted = pollution(record.conditions, local=server is not None)

    def check(self, arm: Arm, url: str, server: VllmServer | None, replay: Replay) -> None:
        """Raises when the server is gone, or when nothing at all went well."""
        failed = [one for one in replay.records if one.error is not None]
        if not failed:
            return
        if server is not None and not server.alive():
            raise ServerError(
                f"the server of arm {arm.name!r} died: {failed[0].error}\nits log ends with:\n{server.tail()}"
            )
        try:
            find_endpoint(url)
        except EndpointError as error:
            raise EndpointError(f"the server of arm {arm.name!r} went away: {failed[0].error}; {error}") from error
        if len(failed) == len(replay.records):
            raise EndpointError(f"every request to arm {arm.name!r} failed; the first: {failed[0].error}")


def in_one_line(record: RoundRecord) -> str:
    state = record.error or "; ".join(f"polluted: {why}" for why in record.polluted) or "clean"
    took = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in record.seconds.items())
    return f"round {record.round + 1} · {record.arm}: {took}{' · ' if took else ''}{state}"


async def in_session(replay: Replay) -> None:
    async with replay.client:
        await replay.run()
