"""An experiment: arms in turns, round after round, one server at a time, everything written down as it happens."""

import os
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop

from vllm_agentserve.bench.arms import Arm, hidden, last_value, option_name
from vllm_agentserve.bench.arrivals import all_at_once, arriving, capacity_per_s, lead_s
from vllm_agentserve.bench.client import StreamingClient
from vllm_agentserve.bench.conditions import Conditions, pollution
from vllm_agentserve.bench.endpoint import Endpoint, EndpointError, added, find_endpoint, kv_blocks, read_counters
from vllm_agentserve.bench.machine import describe_machine, shown
from vllm_agentserve.bench.plan import Cell, Plan
from vllm_agentserve.bench.progress import Progress
from vllm_agentserve.bench.records import LEAD, Results, RoundRecord
from vllm_agentserve.bench.replay import Replay
from vllm_agentserve.bench.server import RunningServer, ServerError, VllmServer
from vllm_agentserve.bench.sessions import (
    Session,
    WorkloadError,
    alone_of,
    count_requests,
    live_context,
    salted,
    warm_up_of,
)

LONGEST_NAME = 50
"""Characters of an arm's name in the name of a file."""
BLOCKS_KEPT = 0.95
"""Share of the KV blocks a first start finds room for that every arm gets, where no size is given."""


class Experiment:
    """Runs a plan and writes its results, of every cell into a folder of its own.

    Raises:
        ServerError, EndpointError, WorkloadError: from `run`, when an arm cannot be measured; what was measured before
            is kept.
    """

    def __init__(self, plan: Plan, folder: Path, progress: Progress) -> None:
        self.plan = plan
        self.progress = progress
        self.folder = folder
        self.options = self.serve_options()
        self.capacity_per_s: dict[str, float] = {}
        """By cell whose sessions arrive at a share of it: sessions per second when all come at once."""
        self.results = {cell.name: Results.create(folder / cell.name, self.description(cell)) for cell in plan.cells}

    def serve_options(self) -> tuple[str, ...]:
        """What every server of ours gets, whatever the arm."""
        plan = self.plan
        options = list(plan.serve)
        if not any(option_name(option) == "--max-model-len" for option in options):
            room = -(-max(plan.context_tokens, 2048) // 256) * 256
            options += ["--max-model-len", str(plan.kv_pool.fitting(room))]
        options += plan.kv_pool.options
        if plan.kv_bytes is not None:
            options += ["--kv-cache-memory-bytes", str(plan.kv_bytes)]
        return tuple(options)

    def server(self, arm: Arm, log: Path) -> VllmServer | RunningServer:
        """The arm's server, not started yet.

        Raises:
            WorkloadError: it would be ours, and there is no model.
        """
        if arm.url is not None:
            return RunningServer(arm.url)
        if self.plan.model is None:
            raise WorkloadError(f"arm {arm.name!r} needs a server of ours, and so --model")
        return VllmServer(
            self.plan.model,
            [*self.options, *arm.options],
            port=self.plan.port,
            log=log,
            start_timeout_s=self.plan.start_timeout_s,
        )

    def key(self, arm: Arm) -> str | None:
        """The API key that the server of an arm wants: ours want what their options or the environment give them."""
        if not arm.ours:
            return arm.key
        return last_value((*self.options, *arm.options), "--api-key") or os.environ.get("VLLM_API_KEY")

    def description(self, cell: Cell) -> dict[str, Any]:
        plan = self.plan
        arms = []
        for arm in plan.arms:
            command = None
            if arm.ours:
                model = "MODEL" if plan.model is None else shown(plan.model)
                command = shlex.join(["vllm", "serve", model, *map(shown, hidden([*self.options, *arm.options]))])
            arms.append({"name": arm.name, "url": arm.url, "command": command, "settings": arm.settings})
        return {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "command": shlex.join(map(shown, hidden(plan.command))),
            "machine": describe_machine(),
            "arms": arms,
            "workload": cell.workload | self.pace(cell),
            "cell": cell.name,
            "live_tokens": [live_context(cell.sessions(number)) for number in range(plan.rounds)],
            "rounds": plan.rounds,
            "seed": plan.seed,
            "salt": plan.salt,
            "primary": list(plan.primary),
            "answers": plan.answers,
            "anonymous": plan.anonymous,
            "slo_factor": plan.slo_factor,
            "isolated_arm": self.isolated.name if plan.slo_factor else None,
            "requests_per_round": count_requests(cell.sessions(0)),
        }

    def pace(self, cell: Cell) -> dict[str, str]:
        """How fast sessions arrive, as far as it is known by now; nothing where they do not."""
        capacity, arrivals = self.capacity_per_s.get(cell.name), cell.arrivals
        if arrivals is None:
            return {}
        found = {} if arrivals.load is None else {"load": f"{arrivals.load:g}"}
        if arrivals.per_s is not None or capacity is not None:
            found |= {"sessions_per_s": f"{arrivals.rate(capacity):.4g}"}
        return found | (
            {} if capacity is None else {"capacity_per_s": f"{capacity:.4g}", "capacity_of": self.isolated.name}
        )

    @property
    def isolated(self) -> Arm:
        """The arm whose server runs every session alone: stock where there is one."""
        return next((arm for arm in self.plan.arms if arm.name == "stock"), self.plan.arms[0])

    def run(self) -> None:
        plan = self.plan
        for arm in plan.arms:
            if arm.url is not None:
                # Before the first measurement, not after those of the arms before it.
                self.check_room(arm, find_endpoint(arm.url, arm.key))
        names = [option_name(option) for option in self.options]
        if plan.kv_bytes is None and not any("kv-cache" in name or "gpu-blocks" in name for name in names):
            self.size_kv_cache()
        self.measure_capacity()
        drawn = [cell.sessions(number) for cell in plan.cells for number in range(plan.rounds)]
        alone = [count_requests(alone_of(sessions, "")) if plan.slo_factor else 0 for sessions in drawn]
        self.progress.begin(sum(map(count_requests, drawn)) * len(plan.arms) + sum(alone))
        for number in range(plan.rounds):
            for arm in plan.order(number):
                self.progress.say(f"round {number + 1}/{plan.rounds} · {arm.name}")
                self.run_arm(arm, number)

    def size_kv_cache(self) -> None:
        """On a GPU vLLM sizes the cache by what is left; other chunks leave other room. One size for all, found once."""
        arm = next((arm for arm in self.plan.arms if arm.ours), None)
        if arm is None:
            return
        self.progress.say("finding a KV cache size that all arms can have")
        with self.server(arm, self.folder / "server-sizing.log") as server:
            found = kv_blocks(server.url, self.key(arm))
        if found is None:
            raise ServerError("the server does not say how large its KV cache is: give the size with --kv-gib")
        self.options = (*self.options, "--num-gpu-blocks-override", str(int(found[0] * BLOCKS_KEPT)))

    def measure_capacity(self) -> None:
        """What a load is a share of: the sessions of the first round, all at once, on a server of the baseline."""
        cells = [cell for cell in self.plan.cells if cell.arrivals is not None and cell.arrivals.load is not None]
        if not cells:
            return
        arm = self.isolated
        self.progress.say(f"measuring how many sessions {arm.name} completes per second")
        with self.server(arm, self.folder / "server-capacity.log") as server:
            endpoint = find_endpoint(server.url, self.key(arm))
            self.check_room(arm, endpoint)
            client = StreamingClient(server.url, endpoint.model, endpoint.extensions, self.key(arm))
            for cell in cells:
                sessions = salted(cell.sessions(0), f"capacity {self.plan.salt} {cell.name}")
                for planned in (warm_up_of(sessions, f"capacity {self.plan.seed}"), all_at_once(sessions)):
                    replay = self.replay(client, planned, arm, 0, "capacity", "-capacity")
                    uvloop.run(in_session(replay))
                    self.check(arm, server, replay)
                capacity = capacity_per_s(sessions, replay.records)
                if capacity is None:
                    raise EndpointError(
                        f"arm {arm.name!r} answered no session to its end, so there is no capacity to take a share of: "
                        "give a rate with --sessions-per-s"
                    )
                self.capacity_per_s[cell.name] = capacity
                self.results[cell.name].describe(self.description(cell))
                self.progress.note(f"{arm.name} completes {capacity:.3g} sessions per second")

    def run_arm(self, arm: Arm, number: int) -> None:
        """One arm in one round: a server, then every cell on it; when it fails, the cells left out say why."""
        began = time.perf_counter()
        waiting = self.plan.cells_of(number)
        with ExitStack() as stack:
            try:
                server = self.server(arm, self.folder / self.log_name(arm, number))
                stack.enter_context(server)
                start = {"start": round(time.perf_counter() - began, 3)} if arm.ours else {}
                while waiting:
                    self.run_cell(waiting.pop(0), arm, number, server, start)
                    start = {}
            except BaseException as error:
                for cell in waiting:
                    record = self.new_record(arm, number)
                    record.error = in_a_line(error)
                    self.results[cell.name].add_round(record)
                    self.progress.note(in_one_line(record, cell))
                raise

    def log_name(self, arm: Arm, number: int) -> str:
        """Of the file with its server's output in a round; no longer than file systems allow."""
        name = "".join(c if c.isalnum() or c in "-=." else "_" for c in arm.name)
        if len(name) > LONGEST_NAME:
            name = f"{name[:LONGEST_NAME]}-{self.plan.arms.index(arm) + 1}"
        return f"server-{number + 1}-{name}.log"

    def run_cell(
        self, cell: Cell, arm: Arm, number: int, server: VllmServer | RunningServer, start: dict[str, float]
    ) -> None:
        """Warm-up of a fresh server, the measured part, the isolated run; then everything is written."""
        record = self.new_record(arm, number)
        record.seconds |= start
        try:
            self.measure(cell, arm, number, record, server, warm=arm.ours and not start)
        except BaseException as error:
            record.error = in_a_line(error)
            raise
        finally:
            self.results[cell.name].add_round(record)
            self.progress.note(in_one_line(record, cell))

    def new_record(self, arm: Arm, number: int) -> RoundRecord:
        return RoundRecord(arm=arm.name, round=number, began=datetime.now(UTC).strftime("%H:%M:%S"))

    def measure(
        self,
        cell: Cell,
        arm: Arm,
        number: int,
        record: RoundRecord,
        server: VllmServer | RunningServer,
        warm: bool,
    ) -> None:
        plan, url = self.plan, server.url
        endpoint, key = find_endpoint(url, self.key(arm)), self.key(arm)
        record.software = endpoint.kind
        blocks = kv_blocks(url, key)
        record.kv_tokens = None if blocks is None else blocks[0] * blocks[1]
        if arm.ours and (wrong := plan.kv_pool.mismatch(record.kv_tokens)):
            raise ServerError(f"the server of arm {arm.name!r} states {wrong}")
        self.check_room(arm, endpoint)
        sessions, mark = plan.sessions(cell, number), plan.mark(cell, number)
        seed = " ".join(filter(None, (str(plan.seed), str(number), mark)))
        client = StreamingClient(url, endpoint.model, endpoint.extensions, key)
        if cell.arrivals is not None:
            sessions = arriving(sessions, cell.arrivals.seed, cell.arrivals.rate(self.capacity_per_s.get(cell.name)))
        parts = {"measured": sessions} if warm else {"warm-up": warm_up_of(sessions, seed), "measured": sessions}
        if plan.slo_factor and arm is self.isolated:
            parts["alone"] = alone_of(sessions, seed)
        for part, planned in parts.items():
            on_turn = self.progress.advance if part != "warm-up" else lambda: None
            replay = self.replay(client, planned, arm, number, part, f"-{mark}" if mark else "", on_turn)
            counted = read_counters(url, key)
            with Conditions(replay.lateness_ms) as conditions:
                try:
                    uvloop.run(in_session(replay))
                finally:
                    if part != "warm-up":
                        self.results[cell.name].add(replay.records)
            record.seconds[part] = round(replay.seconds, 6)
            if part == "measured" and cell.arrivals is not None:
                record.seconds |= {LEAD: round(lead_s(planned), 6), part: round(replay.seconds - lead_s(planned), 6)}
            self.check(arm, server, replay)
            if part == "measured":
                record.server = added(counted, read_counters(url, key))
                record.conditions = conditions.report()
                record.gpu = conditions.gpu.report(sum(len(one.stamps_us) for one in replay.records))
                record.polluted = pollution(record.conditions, local=arm.ours)

    def replay(
        self,
        client: StreamingClient,
        planned: Sequence[Session],
        arm: Arm,
        number: int,
        part: str,
        suffix: str,
        on_turn: Callable[[], None] = lambda: None,
    ) -> Replay:
        """Sessions against the server of an arm, with what the arm asks of its client."""
        return Replay(
            client,
            planned,
            arm.name,
            number,
            part,
            self.plan.answers,
            on_turn,
            anonymous=self.plan.anonymous or arm.client.anonymous,
            suffix=suffix,
            live=arm.client.live,
            last=arm.client.last,
            ranks=arm.client.ranks,
        )

    def check_room(self, arm: Arm, endpoint: Endpoint) -> None:
        """Raises `WorkloadError` where the longest context does not fit."""
        if endpoint.max_model_len is not None and self.plan.context_tokens > endpoint.max_model_len:
            raise WorkloadError(
                f"arm {arm.name!r} has room for {endpoint.max_model_len} tokens, the workload needs {self.plan.context_tokens}: "
                f"use a smaller --scale"
            )

    def check(self, arm: Arm, server: VllmServer | RunningServer, replay: Replay) -> None:
        """Raises when the server is gone, or when nothing at all went well."""
        failed = [one for one in replay.records if one.error is not None]
        if not failed:
            return
        if not server.alive():
            raise ServerError(f"the server of arm {arm.name!r} died: {failed[0].error}\n{server.last_words()}")
        try:
            find_endpoint(server.url, self.key(arm))
        except EndpointError as error:
            raise EndpointError(f"the server of arm {arm.name!r} went away: {failed[0].error}; {error}") from error
        if len(failed) == len(replay.records):
            raise EndpointError(f"every request to arm {arm.name!r} failed; the first: {failed[0].error}")


def in_a_line(error: BaseException) -> str:
    return (
        "interrupted" if isinstance(error, KeyboardInterrupt) else (str(error) or type(error).__name__).splitlines()[0]
    )


def in_one_line(record: RoundRecord, cell: Cell) -> str:
    state = record.error or "; ".join(f"polluted: {why}" for why in record.polluted) or "clean"
    took = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in record.seconds.items())
    name = f"{record.arm} · {cell.name}" if cell.name else record.arm
    return f"round {record.round + 1} · {name}: {took}{' · ' if took else ''}{state}"


async def in_session(replay: Replay) -> None:
    async with replay.client:
        await replay.run()
