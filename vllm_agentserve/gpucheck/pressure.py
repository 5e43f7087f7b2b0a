"""Agents under memory pressure: whether load control makes them finish sooner. All engines run side by side and take turns."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from vllm_agentserve.bench.kv_pool import KvPool
from vllm_agentserve.bench.plan import in_turns
from vllm_agentserve.bench.records import Record
from vllm_agentserve.gpucheck.archive import write_archive
from vllm_agentserve.gpucheck.check_run import PACKAGE, CheckRun, PartResult
from vllm_agentserve.gpucheck.engines import Setting
from vllm_agentserve.gpucheck.environment import UNKNOWN, free_gib
from vllm_agentserve.gpucheck.pressure_cells import HOST_LARGE, LARGE, TINY, WARM_UP_AGENTS, Cell, pool_for, seed_of
from vllm_agentserve.gpucheck.pressure_engine import read_packed
from vllm_agentserve.gpucheck.pressure_figures import (
    COUNTERS,
    STOCK,
    CellRounds,
    cell_text,
    figures_of,
    table,
)
from vllm_agentserve.gpucheck.standing_task import StandingTask, StandingTaskError
from vllm_agentserve.shapes import SHAPES, TOY, ModelShape, kv_block_bytes, weight_bytes
from vllm_agentserve.vllm_compat.host import room_obstacle, transfer_options

ROUNDS = 3
GRAPH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32)
"""Decode batches that are CUDA graphs: up to all agents."""
LARGE_TOKENS, TINY_TOKENS = 16384, 1024
"""`max_model_len`: more than the longest context."""
REST_GIB, MARGIN_GIB = 3.5, 8.0
"""GPU memory of an engine beside weights and KV cache; what is to stay free when all engines have started."""
UTILIZATION = 0.05
"""Share of the GPU's memory that must be free when an engine starts. Nothing else depends on it, since the size of the KV cache
is given: vLLM does not measure memory then, which it could not do beside engines that start at the same time."""
PATIENCE = 1.5
"""Times the patience with a small engine."""
WARM_UP = -1
"""The number of the warm-up among the rounds."""
ENOUGH = 1.1
"""A round is begun when so many times what it is thought to take is left."""


@dataclass(frozen=True)
class Arm:
    """One engine and its client.

    Args:
        limited: whether its client lets only as many agents in as the KV cache has room for.
        options: ours.
        host: size of the host memory behind the KV cache, in KV caches; 0 for none.
        host_policy: what makes room in it.
    """

    name: str
    engine: str = STOCK
    limited: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    host: float = 0.0
    host_policy: str = "lru"


OURS = Arm("agentserve", "time-sliced")
ARMS = (
    Arm(STOCK),
    OURS,
    Arm("stock-limited", limited=True),
    Arm("agentserve-no-load-control", "time-sliced", options={"load_control": False}),
)
LARGE_HOST = 5.0
"""Room for contexts of four KV caches, and some to spare."""


@dataclass(frozen=True)
class Comparison:
    """What one part compares.

    Args:
        name: of the part, and the beginning of its files' names.
        cells: with a GPU.
        rounds: of each cell, at most.
    """

    name: str
    arms: Sequence[Arm]
    cells: Sequence[Cell]
    rounds: int


LOAD_CONTROL = Comparison("pressure", ARMS, LARGE, ROUNDS)
HOST = Comparison(
    "pressure-host",
    (
        Arm(STOCK),
        Arm("agentserve-host", "time-sliced", host=LARGE_HOST, host_policy="program"),
        OURS,
        Arm("stock-offload", host=LARGE_HOST),
    ),
    HOST_LARGE,
    2,
)
"""Host memory behind the KV cache: ours, and vLLM's own offloading of that size."""
DECIDES = "session_mean_s"


@dataclass
class Measured:
    """What the part has so far."""

    cells: dict[str, CellRounds] = field(default_factory=dict)
    starts: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """By arm: what its engine said when it was ready."""
    lost: dict[str, StandingTaskError] = field(default_factory=dict)
    """By arm: why its engine is gone."""


def cells_for(check: CheckRun, comparison: Comparison = LOAD_CONTROL) -> Sequence[Cell]:
    return TINY if check.small or check.device == "cpu" else comparison.cells


def arms_for(check: CheckRun, comparison: Comparison = LOAD_CONTROL) -> Sequence[Arm]:
    return comparison.arms[:2] if check.small else comparison.arms


def host_gib(arm: Arm, shape: ModelShape, pool: KvPool) -> float:
    """Size of an arm's host memory."""
    return round(arm.host * pool.blocks * kv_block_bytes(shape, pool.block_tokens) / 2**30, 3)


def needed_gib(shape: ModelShape, pool: KvPool, engines: int) -> float:
    """GPU memory for so many engines at the same time, with the margin."""
    one = (weight_bytes(shape) + pool.blocks * kv_block_bytes(shape, pool.block_tokens)) / 2**30 + REST_GIB
    return engines * one + MARGIN_GIB


def shape_for(free: float | None, pool: KvPool, engines: int) -> ModelShape | None:
    """The largest shape of which all engines fit into so much free GPU memory; None where none fits. The toy without a GPU."""
    if free is None:
        return TOY
    return next((shape for shape in SHAPES if needed_gib(shape, pool, engines) <= free), None)


def setting(check: CheckRun, arm: Arm, shape: ModelShape, pool: KvPool) -> Setting:
    large = cells_for(check) is not TINY
    options = dict(arm.options)
    engine: dict[str, Any] = {
        "max_model_len": LARGE_TOKENS if large else TINY_TOKENS,
        "max_num_seqs": max(GRAPH_SIZES),
        "max_num_batched_tokens": 8192,
        "block_size": pool.block_tokens,
        "num_gpu_blocks_override": pool.blocks,
        "kv_cache_memory_bytes": pool.blocks * kv_block_bytes(shape, pool.block_tokens),
    }
    if check.device == "cuda":
        engine["gpu_memory_utilization"] = UTILIZATION
    if arm.host:
        size = host_gib(arm, shape, pool)
        if arm.engine == STOCK:
            engine["kv_transfer_config"] = transfer_options(size, arm.host_policy, check.device == "cpu")
        else:
            options |= {"kv_host_gib": size, "kv_host_policy": arm.host_policy}
    return Setting(
        arm.engine,
        shape.name,
        "bfloat16",
        check.device,
        # A folder of its own: the engines start at the same time, and each writes the configuration of the model.
        str(check.folder / f"model-{arm.name}"),
        True,
        options,
        engine,
        GRAPH_SIZES,
        check.compiled,
    )


def warm_up_s(cell: Cell) -> float:
    """What the warm-up of an engine takes at least: agents begin every 0.2 s, and each has one tool."""
    return 0.2 * min(cell.agents, WARM_UP_AGENTS) + 1.25 * cell.gap_s


class Pressure:
    """The part, under way.

    Args:
        check: where it runs.
        shape: of the model.
    """

    def __init__(self, check: CheckRun, shape: ModelShape, pool: KvPool, comparison: Comparison = LOAD_CONTROL) -> None:
        self.check = check
        self.shape = shape
        self.pool = pool
        self.comparison = comparison
        self.cells = cells_for(check, comparison)
        self.arms = arms_for(check, comparison)
        self.measured = Measured()
        self._engines: dict[str, StandingTask] = {}
        self._last: tuple[Cell, float] | None = None
        """The last round: its cell, and the seconds it took."""

    @property
    def limit_s(self) -> float:
        """How long an engine may take for anything: its own limit, or what the part has left."""
        return min(PATIENCE * self.check.patience_s, max(self.check.left_s(), 0.0))

    def run(self) -> None:
        """Starts all engines, measures cell by cell, and ends the engines, whatever happens."""
        try:
            self.start()
            for cell in self.cells:
                self.measure(cell)
        finally:
            for engine in self._engines.values():
                engine.hang_up()
            for engine in self._engines.values():
                engine.close()

    def start(self) -> None:
        """All engines at the same time; waits for each. Those whose process ended are started once more when the others have
        started, in new interpreters: the others, or the fork, may have been in their way."""
        arms = list(self.arms)
        for fresh in (False, True):
            if self.limit_s > 0:
                for arm in arms:
                    self._engines[arm.name] = self._engine(arm, fresh)
                arms = [arm for arm in arms if self._ready(arm)]

    def _engine(self, arm: Arm, fresh: bool) -> StandingTask:
        given = asdict(setting(self.check, arm, self.shape, self.pool))
        return StandingTask(
            self.check,
            f"{self.comparison.name}-{arm.name}",
            f"{PACKAGE}.pressure_engine:serve",
            {"setting": given},
            self.limit_s,
            fresh,
        )

    def _ready(self, arm: Arm) -> bool:
        """Waits until an engine has started; returns whether it may be started again."""
        try:
            self.measured.starts[arm.name] = self._engines[arm.name].ready(self.limit_s)
        except StandingTaskError as error:
            self._engines[arm.name].crashed_after_fork()
            self._lose(arm, error)
            return error.ended
        self.measured.lost.pop(arm.name, None)
        print(
            f"  {self.comparison.name}: {arm.name} started ({self.measured.starts[arm.name]['start_s']:.0f} s)",
            flush=True,
        )
        return False

    def _lose(self, arm: Arm, error: StandingTaskError) -> None:
        """An engine is gone; the others go on."""
        self.measured.lost[arm.name] = error
        self._engines.pop(arm.name).close()
        print(f"  {self.comparison.name}: {arm.name}: {str(error).splitlines()[0]}", flush=True)

    @property
    def alive(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.name in self._engines]

    def measure(self, cell: Cell) -> None:
        """A warm-up of each engine with the tools of this cell, then as many rounds as the time allows."""
        if self.check.left_s() < ENOUGH * (self.expected_s(cell) + warm_up_s(cell) * len(self.alive)):
            return
        for arm in self.alive:
            self._ask(arm, cell, WARM_UP)
        for number in range(1 if cell in TINY else self.comparison.rounds):
            if not self.alive or self.check.left_s() < ENOUGH * self.expected_s(cell):
                return
            began = time.monotonic()
            self.round(cell, number)
            self._last = cell, time.monotonic() - began

    def expected_s(self, cell: Cell) -> float:
        """What a round of a cell is thought to take, from the last round of this cell or another one; 0 before the first."""
        if self._last is None:
            return 0.0
        last, took_s = self._last
        more_s = max(cell.gap_s - last.gap_s, 0.0) * cell.turns * len(self.alive)
        return took_s * max(cell.agents / last.agents, 1.0) + more_s

    def round(self, cell: Cell, number: int) -> None:
        """All arms, one after the other, with the same sessions. It counts if every engine that is left came to its end."""
        done: list[Arm] = []
        turns = in_turns(len(self.arms), number)
        for arm in [self.arms[index] for index in turns]:
            if arm in self.alive and self._ask(arm, cell, number):
                done.append(arm)
        if self.check.left_s() <= 0 and len(done) < len(self.arms):
            return
        rounds = self.measured.cells.setdefault(cell.name, CellRounds())
        found = {arm.name: read_packed(self._raw(arm, cell, number)) for arm in self.arms if arm in done}
        rounds.figures[number] = {
            name: figures_of(msgspec.convert(one["records"], list[Record]), one["seconds"])
            for name, one in found.items()
        }
        rounds.counters[number] = {name: one["counters"] for name, one in found.items()}
        self.keep()

    def _raw(self, arm: Arm, cell: Cell, number: int) -> Any:
        return self.check.folder / "raw" / f"{self.comparison.name}-{cell.name}-{number}-{arm.name}.json.gz"

    def _ask(self, arm: Arm, cell: Cell, number: int) -> bool:
        """One arm of a round, or the warm-up; returns whether it came to its end."""
        if self.check.left_s() <= 0:
            return False
        warm_up = number == WARM_UP
        question = {
            "cell": asdict(cell),
            "seed": seed_of(self.cells, cell, number),
            "arm": arm.name,
            "round": number,
            "live": cell.live if arm.limited and not warm_up else None,
            "warm_up": warm_up,
            "raw": None if warm_up else str(self._raw(arm, cell, number)),
        }
        try:
            answer = self._engines[arm.name].ask(question, self.limit_s)
        except StandingTaskError as error:
            self._lose(arm, error)
            return False
        what = "warm-up" if warm_up else f"round {number}"
        held = answer.get("load_held_requests")
        more = f", {held:g} calls held for {answer['load_hold_seconds']:.3g} s" if held else ""
        print(f"  {self.comparison.name}: {cell.name}, {what}, {arm.name}: {answer['seconds']:.1f} s{more}", flush=True)
        return True

    def keep(self) -> None:
        """Writes what there is so far, and the archive. A full disk does not end the part.

        The tables are for a check that is ended before it has a summary.
        """
        try:
            (self.check.folder / "raw" / f"{self.comparison.name}.md").write_text("\n".join(self.page()) + "\n")
            write_archive(self.check.folder)
        except OSError as error:
            print(f"  results so far could not be written: {error}", flush=True)

    def page(self) -> list[str]:
        """Markdown lines for the summary."""
        kind = "real random weights" if self.shape is TOY else "vLLM's dummy weights"
        lines = [
            f"Model `{self.shape.name}` ({kind}), bfloat16; a KV cache of {self.pool.tokens} tokens for each engine. "
            f"{len(self.arms)} engines run side by side and take turns. "
            f"The model is {'compiled, as in a server' if self.check.compiled else 'not compiled'}.",
        ]
        for arm in self.arms:
            if arm.host:
                size = host_gib(arm, self.shape, self.pool)
                lines.append(
                    f"`{arm.name}` has {size:g} GiB of host memory, {arm.host:g} KV caches (`{arm.host_policy}`)."
                )
        for cell in self.cells:
            if (rounds := self.measured.cells.get(cell.name)) is None:
                continue
            title = f"{cell.agents} agents of {cell.turns} turns, tools of {cell.gap_s:g} s, contexts of {cell.times} KV caches"
            if any(arm.limited for arm in self.arms):
                title += f"; `stock-limited` lets {cell.live} in"
            lines += ["", f"**{title}**", "", *table(rounds)]
        if self.measured.starts:
            lines += ["", "| arm | engine start (s) | KV blocks |", "|---|---:|---:|"]
            for name, one in self.measured.starts.items():
                lines.append(f"| {name} | {one['start_s']:.1f} | {one['blocks']} |")
        for name, error in self.measured.lost.items():
            lines += ["", f"`{name}`:", "", "```", *str(error).splitlines(), "```"]
        return lines

    def finding(self) -> PartResult:
        """The verdict: that the arms ran, and what the figures are."""
        measured, page = self.measured, self.page()
        figures = {
            "model": self.shape.name,
            "compiled": self.check.compiled,
            "kv_tokens": self.pool.tokens,
            "engines": measured.starts,
            "cells": {
                name: {
                    "figures": cell.figures,
                    "counters": {
                        number: {arm: {key: own[key] for key in COUNTERS if key in own} for arm, own in arms.items()}
                        for number, arms in cell.counters.items()
                    },
                }
                for name, cell in measured.cells.items()
            },
        }
        shown = []
        for name, cell in measured.cells.items():
            others = [f"{arm} {cell_text(cell, arm, DECIDES)}" for arm in cell.arms if arm != STOCK]
            shown.append(f"{name}: " + ", ".join(others) if others else name)
        line = "session, mean, of stock's: " + "; ".join(shown) if shown else "no round came to its end"
        failed = [name for name, error in measured.lost.items() if not error.out_of_time]
        wrong = [name for name, one in measured.starts.items() if one["blocks"] != self.pool.blocks]
        if failed:
            return PartResult("failed", f"{', '.join(failed)} did not finish; {line}", page, figures)
        if wrong:
            return PartResult("failed", f"{', '.join(wrong)}: the KV cache has another size; {line}", page, figures)
        missing = [cell.name for cell in self.cells if cell.name not in measured.cells]
        if not shown:
            return PartResult("ran out of time", line, page, figures)
        if missing:
            line += f"; no time for {', '.join(missing)}"
        return PartResult("ok", line, page, figures)


def host_obstacle(comparison: Comparison, shape: ModelShape, pool: KvPool, shared: bool) -> str | None:
    """Why the engines cannot have their host memory all at once; None if they can, or have none."""
    wanted = sum(host_gib(arm, shape, pool) for arm in comparison.arms)
    return room_obstacle(wanted, shared) if wanted else None


def run_comparison(check: CheckRun, comparison: Comparison) -> PartResult:
    """A part."""
    free = free_gib(check)
    if free is None and check.device == "cuda":
        return PartResult("not run", UNKNOWN)
    arms = arms_for(check, comparison)
    pool = pool_for(cells_for(check, comparison), check.device == "cuda")
    shape = shape_for(free, pool, len(arms))
    if shape is None:
        return PartResult("not run", f"{free:.0f} GiB of GPU memory do not suffice for {len(arms)} engines at a time")
    if (obstacle := host_obstacle(comparison, shape, pool, check.device == "cuda")) is not None:
        return PartResult("not run", f"host memory of the engines: {obstacle}")
    part = Pressure(check, shape, pool, comparison)
    part.run()
    return part.finding()


def run(check: CheckRun) -> PartResult:
    """The part that compares load control."""
    return run_comparison(check, LOAD_CONTROL)


def run_host(check: CheckRun) -> PartResult:
    """The part that compares host memory."""
    return run_comparison(check, HOST)
