"""The real worker half of the lane behind vLLM's real scheduler, without a model: what each KV block holds is followed token by
token, so that whoever reads a block before it is written, or after it was given to another request, is found."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput

from tests.support.lane_driver import LaneDriver
from tests.support.lane_provider import Lanes
from tests.support.schedulers import BLOCK, make_request, make_scheduler
from vllm_agentserve.lanes import connector_worker as worker_half
from vllm_agentserve.lanes.connector import LaneWorkerMetadata
from vllm_agentserve.lanes.connector_worker import LaneConnectorWorker
from vllm_agentserve.lanes.lane import LaneReport, Outcome, Slot
from vllm_agentserve.policy.jobs import Job
from vllm_agentserve.policy.step_sizes import StepSize

SAMPLED = 17
"""The token that `schedulers.Driver` samples."""


@dataclass
class KvContents:
    """What is in the KV cache: for every slot of a block a hash of all tokens up to the one whose KV it holds."""

    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    _tables: dict[str, list[int]] = field(default_factory=dict)
    _prompts: dict[str, list[int]] = field(default_factory=dict)

    def chain(self, tokens: list[int]) -> list[int]:
        found, last = [], 0
        for token in tokens:
            last = hash((last, token))
            found.append(last)
        return found

    def write(self, tokens: list[int], table: list[int], begin: int, end: int) -> None:
        hashes = self.chain(tokens[:end])
        for at in range(begin, end):
            self.slots[table[at // BLOCK], at % BLOCK] = hashes[at]

    def read(self, who: str, tokens: list[int], table: list[int], end: int) -> None:
        for at, expected in enumerate(self.chain(tokens[:end])):
            if self.slots.get((table[at // BLOCK], at % BLOCK)) != expected:
                self.wrong.append(f"{who} reads token {at} from block {table[at // BLOCK]}, which holds something else")
                return

    def step(self, output: SchedulerOutput) -> None:
        """The worker's model runs: all KV of the step is written, then read."""
        starts = {}
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = list(new.block_ids[0])
            self._prompts[new.req_id] = list(new.prompt_token_ids or [])
            starts[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for index, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[index]
            added = list(blocks[0]) if blocks is not None else []
            self._tables[name] = added if name in cached.resumed_req_ids else self._tables[name] + added
            starts[name] = cached.num_computed_tokens[index]
        work = []
        for name, count in output.num_scheduled_tokens.items():
            end = starts[name] + count
            tokens = self._prompts[name] + [SAMPLED] * max(end - len(self._prompts[name]), 0)
            work.append((name, tokens, self._tables[name], starts[name], end))
        for _, tokens, table, begin, end in work:
            self.write(tokens, table, begin, end)
        for name, tokens, table, _, end in work:
            self.read(f"step of {name}", tokens, table, end)


class FollowedLane:
    """A lane in this process that computes `chunk` tokens when it gets a job, and again whenever a step is launched.

    Args:
        kv: gets what it writes, and is asked for what it reads.
        chunk: tokens at a time; 0: it computes nothing before it is told to `run()`.
    """

    name, slots = "followed", (Slot(1, 1),)

    def __init__(self, kv: KvContents, chunk: int = 10**6, ready: bool = True) -> None:
        self.kv = kv
        self.chunk = chunk
        self.up, self.ready = True, ready
        self.steps: list[bool] = []
        """Whether each step computed."""
        self._held: dict[str, tuple[Job, int]] = {}
        self._ended: list[Outcome] = []
        self._said = False

    @property
    def busy(self) -> bool:
        return bool(self._held)

    def jobs(self) -> list[str]:
        return list(self._held)

    def submit(self, job: Job) -> None:
        assert job.request_id not in self._held, "a job came twice"
        self._held[job.request_id] = (job, job.start)
        self.run(self.chunk)

    def cancel(self, request_id: str) -> None:
        if request_id in self._held:
            self._end(request_id)

    def begin_step(self, size: StepSize | None, slot: int) -> None:
        self.steps.append(size is not None)

    def launch(self) -> None:
        self.run(self.chunk)

    def run(self, tokens: int) -> None:
        """Computes so many tokens of every job."""
        if not self.up or not self.ready or not tokens:
            return
        for name, (job, position) in list(self._held.items()):
            if any(outcome.request_id == name for outcome in self._ended):
                continue
            end = min(position + tokens, job.end)
            self.kv.read(f"lane job of {name}", job.token_ids, job.block_ids[0], position)
            self.kv.write(job.token_ids, job.block_ids[0], position, end)
            self._held[name] = (job, end)
            if end == job.end:
                self._end(name)

    def fail(self, name: str) -> None:
        self._end(name, "failed")

    def let_go(self, name: str) -> Outcome:
        """The end of a job that was cancelled."""
        del self._held[name]
        self._ended = [outcome for outcome in self._ended if outcome.request_id != name]
        return Outcome(name)

    def _end(self, name: str, error: str | None = None) -> None:
        if all(outcome.request_id != name for outcome in self._ended):
            self._ended.append(Outcome(name, error))

    def poll(self, patience_s: float = 0.0) -> list[Outcome]:
        if not self.up:
            for name in self._held:
                self._end(name, "the lane is gone")
        ended, self._ended = self._ended, []
        for outcome in ended:
            del self._held[outcome.request_id]
        return ended

    def report(self) -> LaneReport | None:
        if self._said or not self.ready:
            return None
        self._said = True
        return LaneReport(self.slots)

    def alive(self) -> bool:
        return self.up

    @property
    def gone(self) -> bool:
        return not self.up and not self._held

    def end(self, why: str) -> None:
        self.up = False

    def close(self) -> None:
        self.up = False


class WorkerDriver(LaneDriver):
    """Drives the real `LaneConnectorWorker` as vLLM's model runners do.

    Args:
        make: makes the first lane, and those that follow it.
    """

    def __init__(
        self, scheduler: Any, make: Callable[[KvContents], Any] = FollowedLane, restarts: int = 3, depth: int = 1
    ) -> None:
        super().__init__(scheduler, depth)
        self.kv = KvContents()
        self.lanes: list[Any] = []

        def start() -> Any:
            self.lanes.append(make(self.kv))
            return self.lanes[-1]

        options: Any = SimpleNamespace(lane_restarts=restarts, mode="lanes")
        self.worker = LaneConnectorWorker(options, Lanes(start, start))
        self.worker.start()

    def transfers(self, output: SchedulerOutput) -> KVConnectorOutput:
        self.worker.begin(output.kv_connector_metadata)
        self.kv.step(output)
        self.worker.launched()
        results = self.worker.after_step(output.finished_req_ids)
        said = self.worker.report()
        return KVConnectorOutput(
            finished_recving=results.finished_recving,
            failed_recving=results.failed_recving or set(),
            kv_connector_worker_meta=LaneWorkerMetadata(said) if said else None,
        )


def no_waiting(monkeypatch: Any) -> None:
    """A step without tokens does not wait for the lane."""
    monkeypatch.setattr(worker_half, "IDLE_PATIENCE_S", 0.0)


def at_work(
    asynchronous: bool = False, make: Callable[[KvContents], Any] = FollowedLane, restarts: int = 3, **given: Any
) -> tuple[Any, WorkerDriver]:
    """A scheduler, its worker with a lane, and one stream `s` that decodes."""
    options = {"mode": "lanes", "lane_min_tokens": 100, "lane_max_requests": 2} | given.pop("options", {})
    scheduler: Any = make_scheduler(asynchronous=asynchronous, options=options, lanes=True, **given)
    driver = WorkerDriver(scheduler, make, restarts, depth=2 if asynchronous else 1)
    scheduler.add_request(make_request("s", 20))
    for _ in range(3):
        driver.step()
    return scheduler, driver
