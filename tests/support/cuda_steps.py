"""vLLM's V2 model runner with the connector's worker half on a fake device, its calls nested as in vllm 0.32."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from tests.support.cuda_bench import DECODE, Bench
from tests.support.cuda_device import FakeDevice, FakeStream, blocks
from tests.support.lane_provider import Lanes
from vllm_agentserve.lanes.connector import LaneConnector, LaneMetadata
from vllm_agentserve.lanes.connector_worker import LaneConnectorWorker
from vllm_agentserve.lanes.lane import LaneReport
from vllm_agentserve.policy.jobs import Job
from vllm_agentserve.vllm_compat.cuda_runner import LaneModelRunner


class V2Runner:
    """As `vllm.v1.worker.gpu.model_runner.GPUModelRunner`: `execute_model` ends with the launch of the forward pass, and
    `sample_tokens` calls `KVConnector.post_forward` last, with the step's stream the current one; a step without tokens calls
    all of the connector within `execute_model` (`no_forward`)."""

    def __init__(self, device: FakeDevice, connector: Any) -> None:
        self.device = device
        self.connector = connector
        self.copies = FakeStream(device, "copies")
        self.state: Any = None
        self.results: Any = None
        self.report: LaneReport | None = None

    def main_stream_is(self) -> FakeStream:
        """As the cached property `main_stream`, which may be set."""
        found: FakeStream = vars(self).get("main_stream", self.device.plain)
        return found

    def execute_model(self, output: Any) -> None:
        if output.zeroes:
            self.device.launch("zero", writes=output.zeroes)
        if not output.kv_connector_metadata.size:
            self.pre_forward(output)
            self.post_forward(output.finished)
            return
        self.pre_forward(output)
        self.device.launch("decode", ["state"], ["state"])
        self.state = output

    def sample_tokens(self) -> None:
        if self.state is None:
            return
        output, self.state = self.state, None
        self.device.launch("sample", ["state"], ["state"])
        with self.device.stream(self.copies):
            self.copies.wait_stream(self.main_stream_is())
            self.device.launch("copy", ["state"])
        self.device.current_stream().wait_stream(self.copies)
        self.post_forward(output.finished)

    def pre_forward(self, output: Any) -> None:
        self.connector.handle_preemptions(output.kv_connector_metadata)

    def post_forward(self, finished: set[str]) -> None:
        self.connector.start_load_kv(None)
        self.connector.wait_for_save()
        self.results = self.connector.get_transfer_results(finished)
        said = self.connector.build_connector_worker_meta()
        self.report = said.report if said is not None else None


class WorkerBench(Bench):
    """A worker with a stream lane: the runner above, led by `LaneModelRunner.lead`, and the connector's half at the worker."""

    def __init__(self, base: int = 64, most: int = 512, options: Any = None) -> None:
        super().__init__(base, most)
        self.options = options or SimpleNamespace(lane_restarts=3, mode="lanes")
        self.worker = LaneConnectorWorker(self.options, Lanes(self.make))
        self.connector = object.__new__(LaneConnector)
        self.connector.half = self.worker
        self.main = V2Runner(self.device, self.connector)
        self.leads: Callable[..., None] = lambda *args: LaneModelRunner.lead(SimpleNamespace(_main=self.main), *args)  # type: ignore[arg-type]
        self.connector.register_kv_caches({})
        self.told: dict[str, bool] = {}
        """By job that ended: whether it failed."""
        self.reports: list[LaneReport] = []

    def begin(self, metadata: Any) -> None:
        self.worker.begin(metadata)

    def make(self) -> Any:
        self.leads(self.lane.step, self.lane.step_goes_on)
        return self.lane

    def work(
        self, *jobs: Job, computes: bool = True, slot: int = 0, finished: Sequence[str] = (), through: bool = True
    ) -> None:
        """A step of the engine; with `through`, the device has nothing left to do when it ends."""
        zeroes = [one for job in jobs for one in blocks(job, job.end)[job.start // 16 :]]
        metadata = LaneMetadata(list(jobs), DECODE if computes else None, slot, self.target_ms)
        output = SimpleNamespace(kv_connector_metadata=metadata, zeroes=zeroes, finished=set(finished))
        self.main.execute_model(output)
        if computes:
            self.main.sample_tokens()
        self.note()
        if through:
            self.device.finish()

    def note(self) -> None:
        """Takes in what the worker said; nothing may be told twice, nothing may be wrong."""
        results, report = self.main.results, self.main.report
        for name in results.finished_recving or set():
            assert name not in self.told, f"{name} ended twice"
            self.told[name] = name in (results.failed_recving or set())
        if report is not None:
            self.reports.append(report)
        assert self.device.wrong == []
