"""A worker's steps around a stream lane on a fake device."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from tests.support.cuda_device import FakeDevice, FakeLadder, FakeRunner, FakeStream, blocks
from vllm_agentserve.lanes.cuda.stream import StreamLane
from vllm_agentserve.lanes.lane import Outcome
from vllm_agentserve.policy.jobs import Job
from vllm_agentserve.policy.step_sizes import StepSize

DECODE = StepSize(1, 1)


class NoMemory:
    """In place of `LaneMemory`: nothing was measured, and there is enough."""

    def __init__(self) -> None:
        self.by_stream: dict[str, int] = {}

    def refuse(self, step: int) -> None: ...


class Bench:
    """A worker that runs steps as vLLM does, around a lane on a fake device.

    After every step it looks for violations of order, and that no job has ended whose chunks still run.
    """

    def __init__(self, base: int = 64, most: int = 512) -> None:
        self.device = FakeDevice()
        self.runner = FakeRunner(self.device, lambda: self.now)
        self.ladder = FakeLadder(self.device)
        self.now = 0.0
        self.target_ms = 0.0
        self.ended: list[Outcome] = []
        self.lane = StreamLane(
            self.runner,
            self.ladder,
            FakeStream(self.device, "alone"),
            base,
            most,
            self.device,
            begin=self._begins,
            memory=NoMemory(),
            clock=lambda: self.now,
            sleep=self.sleep,
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def _begins(self, metadata: Any) -> None:
        """Looks `begin` up when a step begins: a test may have put another one there."""
        self.begin(metadata)

    def begin(self, metadata: Any) -> None:
        for job in metadata.jobs:
            self.lane.submit(job)
        self.lane.begin_step(metadata.size, metadata.slot)

    def step(
        self,
        *jobs: Job,
        computes: bool = True,
        slot: int = 0,
        writes: Sequence[str] = (),
        finished: Sequence[str] = (),
        patience_s: float = 0.0,
    ) -> list[Outcome]:
        """vLLM zeroes new blocks, runs the model, samples; the connector then launches and polls."""
        with self.lane.step(
            SimpleNamespace(jobs=jobs, size=DECODE if computes else None, slot=slot, target_ms=self.target_ms)
        ):
            if jobs:
                self.device.launch(
                    "zero", writes=[one for job in jobs for one in blocks(job, job.end)[job.start // 16 :]]
                )
            if computes:
                self.device.launch("decode", ["state"], ["state", *writes])
            else:
                self.lane.launch()
        if computes:
            with self.lane.step_goes_on():
                self.device.launch("sample", ["state"], ["state"])
                self.lane.launch()
        for request_id in finished:
            self.lane.cancel(request_id)
        return self.poll(patience_s)

    def poll(self, patience_s: float = 0.0) -> list[Outcome]:
        outcomes = self.lane.poll(patience_s)
        for outcome in outcomes:
            running = [
                work.name
                for work in self.device.log
                if work.name.startswith(f"chunk {outcome.request_id}@") and work not in self.device.done
            ]
            assert not running, f"{outcome.request_id} has ended while {running} run"
        self.ended += outcomes
        assert self.device.wrong == []
        return outcomes

    def until(self, *request_ids: str, slot: int = 0) -> None:
        """Steps, with the device through with everything after each, until these have ended."""
        for _ in range(100):
            if {outcome.request_id for outcome in self.ended} >= set(request_ids):
                return
            self.device.finish()
            self.step(slot=slot)
        raise AssertionError(f"only {self.ended} ended")


def job(name: str, tokens: int, first_block: int = 10, start: int = 0) -> Job:
    """A prompt of so many tokens beside its last one."""
    ids = list(range(first_block, first_block + -(-(tokens + 1) // 16)))
    return Job(name, [7] * (tokens + 1), (ids,), start, resume=start > 0)
