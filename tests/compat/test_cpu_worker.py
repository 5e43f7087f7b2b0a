"""The worker class on CPUs: which engines get it, and which steps it runs before the first request."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import _custom_ops
from vllm.platforms import current_platform

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.policy.step_sizes import KERNELS_PER_LAYER, StepSize, step_sizes
from vllm_agentserve.scheduler.vllm_hooks import VllmHooks
from vllm_agentserve.vllm_compat import cpu, cpu_worker
from vllm_agentserve.vllm_compat.lanes import CONNECTOR


class Machine:
    """A worker whose model runner only notes what it is asked for, on four cores and with a clock that steps advance."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        lane: bool = False,
        ranks: int = 1,
        seqs: int = 16,
        longest: int = 4096,
        **options: Any,
    ) -> None:
        self.now, self.step_s = 0.0, 0.001
        self.began: list[int] = []
        """Tokens of every step, those for drawing tokens included."""
        self.told: list[StepSize] = []
        """What the half that drives the lane was told before each step."""
        self.mixed: dict[int, bool] = {}
        self.logits: list[int] = []
        self.drawn: list[int] = []
        self.agreed: list[bool] = []
        self.fails_at = 0
        self.draws = True
        self.others_end_after = 0
        self.seeded_after: int | None = None
        half = SimpleNamespace(warms_up=self.told.append) if lane else None
        group = SimpleNamespace(world_size=ranks, is_last_rank=True, broadcast_object=self._agree)
        monkeypatch.setattr(cpu_worker, "local_worker_half", lambda: half)
        monkeypatch.setattr(cpu_worker, "get_world_group", lambda: group)
        monkeypatch.setattr(cpu_worker, "get_pp_group", lambda: group)
        monkeypatch.setattr(cpu_worker.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(cpu_worker.CPUWorker, "compile_or_warm_up_model", lambda _: self._seed())
        worker = object.__new__(cpu_worker.WarmCpuWorker)
        worker.vllm_config = SimpleNamespace(  # type: ignore[assignment]
            additional_config={"agentserve": options},
            scheduler_config=SimpleNamespace(max_num_batched_tokens=2048, max_num_seqs=seqs),
            compilation_config=SimpleNamespace(inductor_compile_config={}),
        )
        worker.model_config = SimpleNamespace(runner_type="generate", max_model_len=longest)  # type: ignore[assignment]
        worker.model_runner = SimpleNamespace(  # type: ignore[assignment]
            kv_caches=[0],
            _dummy_run=self._step,
            _dummy_sampler_run=self._draw,
            get_model=lambda: SimpleNamespace(compute_logits=self.logits.append),
        )
        self.worker = worker

    @property
    def ran(self) -> list[int]:
        """Without those that draw tokens first."""
        return self.began[len(self.drawn) :]

    def _step(self, tokens: int, *, skip_eplb: bool, force_attention: bool, create_mixed_batch: bool) -> Any:
        assert skip_eplb
        assert force_attention
        if tokens == self.fails_at:
            raise RuntimeError("no kernel for so many")
        self.now += self.step_s
        self.began.append(tokens)
        self.mixed[tokens] = create_mixed_batch
        return None, tokens

    def _draw(self, hidden: int) -> None:
        self.drawn.append(hidden)
        if not self.draws:
            raise RuntimeError("no compiler")

    def _agree(self, mine: bool) -> bool:
        self.agreed.append(mine)
        return len(self.agreed) >= self.others_end_after if self.others_end_after else mine

    def _seed(self) -> str:
        self.seeded_after = len(self.began)
        return "times"

    def start(self) -> None:
        assert self.worker.compile_or_warm_up_model() == "times"
        assert self.worker.warmed_up == tuple(self.ran)
        assert self.seeded_after == len(self.began)


def test_every_size_runs_once_before_the_seeds_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.start()
    assert machine.ran == step_sizes(2048, 8)
    assert [size for size, mixed in machine.mixed.items() if not mixed] == list(range(1, 17))
    assert machine.logits == list(range(1, 17))
    assert machine.drawn == [1, 2]


def test_sizes_run_where_tokens_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM compiles what draws them, also with `--enforce-eager`; requests that draw none need no compiler."""
    machine = Machine(monkeypatch)
    machine.draws = False
    machine.worker.compile_or_warm_up_model()
    assert machine.worker.warmed_up == tuple(step_sizes(2048, 8))


@pytest.mark.parametrize("seqs", [1, 2, 16, 128])
def test_no_step_has_a_longer_prompt_than_the_model_takes(monkeypatch: pytest.MonkeyPatch, seqs: int) -> None:
    """There vLLM's tables of KV blocks end, and its attention reads whatever is behind them as numbers of blocks."""
    machine = Machine(monkeypatch, seqs=seqs, longest=512)
    machine.start()
    sizes = step_sizes(2048, 8)
    assert machine.ran == sizes[: len(machine.ran)]
    # As `_dummy_run` divides a step into decodes and a prompt, which has a token of context.
    prompts = [size - min(seqs - 1, size // 2) for size in sizes]
    assert max(prompts[: len(machine.ran)]) + 1 <= 512 < prompts[len(machine.ran)] + 1


def test_the_lane_is_told_of_every_size_with_its_rows_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lane=True)
    machine.start()
    assert machine.told == [StepSize(size, size if size <= 16 else 0) for size in step_sizes(2048, 8)]


def test_it_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, warm_up_s=0.0095)
    machine.start()
    assert len(machine.ran) == 10


def test_all_workers_end_at_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, ranks=2, warm_up_s=0.0025)
    machine.start()
    assert machine.agreed == [False, False, True]


def test_a_step_that_fails_ends_the_warm_up_only(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.fails_at = 5
    machine.start()
    assert machine.ran == list(range(1, 5))


def test_a_worker_on_which_a_step_fails_agrees_with_the_others_until_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the next thing that the first worker tells all of them would be taken for something else."""
    machine = Machine(monkeypatch, ranks=2)
    machine.fails_at, machine.others_end_after = 5, 20
    machine.start()
    assert machine.ran == list(range(1, 5))
    assert machine.agreed == [False] * 4 + [True] * 16


@pytest.mark.parametrize("without", ["option", "variable", "kv", "pooling"])
def test_engines_without(monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    machine = Machine(monkeypatch, **({"warm_up_s": 0.0} if without == "option" else {}))
    if without == "variable":
        monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    if without == "kv":
        machine.worker.model_runner.kv_caches = []  # type: ignore[has-type]
    if without == "pooling":
        machine.worker.model_config.runner_type = "pooling"
    machine.start()
    assert machine.began == []


@pytest.mark.parametrize(
    ("options", "given", "on_cpu", "chosen"),
    [
        ({}, "auto", True, cpu.WORKER),
        ({}, cpu.WORKER, True, cpu.WORKER),
        ({}, "their.Worker", True, "their.Worker"),
        ({}, "auto", False, "auto"),
        ({"mode": "stock"}, "auto", True, "auto"),
        ({"warm_up_s": 0.0}, "auto", True, "auto"),
    ],
)
def test_which_engines_get_it(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], given: str, on_cpu: bool, chosen: str
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: on_cpu)
    arguments = SimpleNamespace(worker_cls=given)
    cpu.choose_worker(arguments, AgentServeConfig(**options))
    assert arguments.worker_cls == chosen


def test_the_check_of_arguments_chooses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_agentserve.scheduler.vllm_hooks.choose_lanes", lambda arguments, options: None)
    monkeypatch.setattr("vllm_agentserve.scheduler.vllm_hooks.add_host", lambda arguments, options: None)
    arguments = SimpleNamespace(worker_cls="auto", additional_config=None)
    VllmHooks.check_engine_args(arguments)
    assert arguments.worker_cls == cpu.WORKER


def no_threads_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "VLLM_CPU_OMP_THREADS_BIND", cpu.OWN_SPINS):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("bind", "given", "mode", "on_cpu", "spins"),
    [
        ("0-3", {}, "auto", True, "3000"),
        ("0,1|2,3", {}, "time-sliced", True, "3000"),
        ("0-7", {}, "lanes", True, "3000"),
        ("0-2", {}, "auto", True, None),
        ("0-1|0-2", {}, "auto", True, None),
        ("auto", {}, "auto", True, None),
        ("nobind", {}, "auto", True, None),
        ("", {}, "auto", True, None),
        ("0-3", {"GOMP_SPINCOUNT": "300000"}, "auto", True, "300000"),
        ("0-3", {"OMP_WAIT_POLICY": "active"}, "auto", True, None),
        ("0-3", {}, "stock", True, None),
        ("0-3", {}, "auto", False, None),
    ],
)
def test_threads_spin_shortly_where_no_core_is_left(
    monkeypatch: pytest.MonkeyPatch, bind: str, given: dict[str, str], mode: str, on_cpu: bool, spins: str | None
) -> None:
    no_threads_said(monkeypatch)
    for name, value in {"VLLM_CPU_OMP_THREADS_BIND": bind, **given}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: on_cpu)
    cpu.shorten_spinning(AgentServeConfig(mode=mode))
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_the_next_engine_of_a_process_does_not_inherit_the_number_of_spins(monkeypatch: pytest.MonkeyPatch) -> None:
    no_threads_said(monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    for mode, bind, spins in [
        ("auto", "0-1", "3000"),
        ("stock", "0-1", None),
        ("auto", "0-1", "3000"),
        ("auto", "0", None),
    ]:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
        cpu.shorten_spinning(AgentServeConfig(mode=mode))
        assert os.environ.get("GOMP_SPINCOUNT") == spins
    cpu.shorten_spinning(AgentServeConfig())
    os.environ["GOMP_SPINCOUNT"] = "77"  # by the user, in between
    cpu.shorten_spinning(AgentServeConfig(mode="stock"))
    assert os.environ["GOMP_SPINCOUNT"] == "77"


@pytest.mark.parametrize(
    ("connector", "kept"), [(None, [32, 128]), ("OffloadingConnector", [32, 128]), (CONNECTOR, [KERNELS_PER_LAYER] * 2)]
)
def test_layers_beside_a_lane_keep_more_kernels(
    monkeypatch: pytest.MonkeyPatch, connector: str | None, kept: list[int]
) -> None:
    """A kernel that was dropped would be made again on the threads beside the lane, and stay on these."""
    made: list[int] = []

    def make(weight: Any, primitive_cache_size: int = 128) -> None:
        made.append(primitive_cache_size)

    def load(worker: Any, *, load_dummy_weights: bool) -> None:
        _custom_ops.create_onednn_mm(None, 32)
        _custom_ops.create_onednn_mm(None)

    monkeypatch.setattr(_custom_ops, "create_onednn_mm", make)
    monkeypatch.setattr(cpu_worker.CPUWorker, "load_model", load)
    worker = Machine(monkeypatch).worker
    transfer = None if connector is None else SimpleNamespace(kv_connector=connector)
    worker.vllm_config.kv_transfer_config = transfer  # type: ignore[assignment]
    worker.load_model()
    assert made == kept
    assert _custom_ops.create_onednn_mm is make
