"""Every option of the scheduler: name, type, unit, default, range and meaning, in one place.

Options are given under one key of vLLM's own `--additional-config`:

    vllm serve MODEL --scheduler-cls vllm_agentserve.AgentScheduler \\
        --additional-config '{"agentserve": {"tpot_slo_ms": 40}}'

The option table of the documentation is generated from the fields below (`python -m vllm_agentserve.config`).
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from vllm_agentserve.options import KEY, OptionError, checked, option, table_of
from vllm_agentserve.policy.order import BYPASS_STEPS, PATIENT_BYPASS_STEPS

__all__ = ["KEY", "SERIES", "AgentServeConfig", "OptionError", "option_table"]

SERIES = "vllm:agentserve_"
"""What our series on `/metrics` begin with."""


@dataclasses.dataclass(frozen=True)
class AgentServeConfig:
    """The validated options. Raises `OptionError` when constructed with a value out of range or of a wrong type."""

    mode: typing.Literal["auto", "time-sliced", "lanes", "stock"] = option(
        "auto",
        "",
        "How prefill and decode share the device. `time-sliced`: each step mixes all decodes with as much prefill as fits "
        "the target. `lanes`: as `time-sliced`, but while others decode prompts of `lane_min_tokens` and more are computed "
        "beside them, on cores or streaming multiprocessors of their own. `auto`: for every prompt whichever of the two reads "
        "it faster within the target; `time-sliced` where lanes cannot run or cannot pay, and it says why. `stock`: vLLM's "
        "own order and chunks, only measured.",
    )
    tpot_slo_ms: float | None = option(
        None,
        "ms",
        "Target for the time between two tokens of a stream while others prefill; it holds whoever waits. Not set: `tpot_factor` "
        "times the median decode step this engine has seen without prefill beside it, and more while many prompts wait beside "
        "few streams, up to 0.55 of the step that stock vLLM would run.",
        low=1.0,
        high=60_000.0,
    )
    tpot_factor: float = option(
        5.0, "x", "Factor of the smallest target where `tpot_slo_ms` is not set.", low=1.1, high=1000.0
    )
    tpot_uncalibrated_ms: float = option(
        50.0,
        "ms",
        "Target until the first decode steps without prefill have been seen; without effect when `tpot_slo_ms` is set.",
        low=1.0,
        high=60_000.0,
    )
    upper_threshold: float = option(
        1.0,
        "x target",
        "The controller shrinks the prefill chunk and the resume budget when the slowest tenth of the steps with prefill is "
        "above this.",
        low=0.1,
        high=10.0,
    )
    lower_threshold: float = option(
        0.93, "x target", "It grows them when that is below this; between the two it holds.", low=0.1, high=10.0
    )
    prefill_floor_tokens: int = option(
        16,
        "tokens",
        "A cold prefill advances by at least this many tokens in every step, and so do the resume prefills together, "
        "whatever the target.",
        low=1,
        high=65_536,
    )
    resume_budget_max_tokens: int = option(
        1024,
        "tokens",
        "Upper bound of the resume budget: a resume prefill with more uncached tokens than the budget waits in line with "
        "the cold ones.",
        low=16,
        high=1_048_576,
    )
    first_chunk_tokens: int = option(
        32,
        "tokens",
        "Largest prefill chunk beside decodes before the step-time model has seen any; later chunks may at most double "
        "the largest one seen.",
        low=1,
        high=65_536,
    )
    chunk_granularity_tokens: int = option(
        8,
        "tokens",
        "Steps that mix decodes and prefill are rounded down to multiples of this many tokens, and to eight sizes an octave: "
        "few sizes, because kernel libraries prepare themselves for each.",
        low=1,
        high=4096,
    )
    max_bypass_steps: int | None = option(
        None,
        "steps",
        "A waiting request that others have overtaken for this many engine steps goes to the front of the queue. Not set: 64; "
        "4096 with policy `plas` or `atlas`, whose levels order requests that wait for seconds, and for requests of class "
        "`batch`.",
        low=1,
        high=1_000_000,
    )
    strict_hints: bool = option(
        False,
        "",
        "A request with a wrong hint (`agent_parent`, `agent_thread`, `agent_deadline_ms`, `agent_class` in `vllm_xargs`) is "
        "refused with status 400. Off: the hint is ignored and counted.",
    )
    policy: typing.Literal["fcfs", "plas", "atlas"] = option(
        "fcfs",
        "",
        "Order of waiting requests. `fcfs`: resume prefills, then cold prefills by arrival. `plas`: first by what their "
        "programs have received so far, the least first. `atlas`: first by the longest path of calls that led to them. A program "
        "is a `session_id`, or else the requests whose prompts go on from one another's answers.",
    )
    program_levels: int = option(
        8,
        "",
        "Levels of service that `plas` and `atlas` tell apart; inside one, the order of `fcfs` holds.",
        low=1,
        high=64,
    )
    program_quantum_ms: float = option(
        500.0,
        "ms",
        "Engine time up to which a program is at the first level; every further level has twice the room of the one before.",
        low=1.0,
        high=3_600_000.0,
    )
    program_promote_ratio: float = option(
        10.0,
        "x service",
        "A call that has waited this many times what its program has received, or quanta if that is less, is at the first "
        "level. All its waits count together, the time it ran between them does not.",
        low=0.1,
        high=100_000.0,
    )
    program_preempt_share: float = option(
        0.0,
        "of service",
        "With `plas` or `atlas`, a running call gives up its place to one of a better level when there is none left, as long as "
        "what has to be computed again stays below this share of service. What the share allowed and nobody lost is kept for "
        "five minutes of service. 0: never.",
        low=0.0,
        high=0.5,
    )
    program_ttl_s: float = option(
        3600.0, "s", "A program that has had no call for so long is forgotten.", low=1.0, high=1_000_000.0
    )
    lane_min_tokens: int = option(
        512,
        "tokens",
        "A prompt with at least this many uncached tokens may go to the prefill lane when others decode.",
        low=16,
        high=1_048_576,
    )
    lane_chunk_tokens: int | None = option(
        None,
        "tokens",
        "The prefill lane computes so many tokens at a time on its smallest share of the device, more on larger ones; between "
        "two chunks it takes or gives back its share, and turns to another prompt. Not set: 256 on CPUs, 1024 on GPUs.",
        low=16,
        high=65_536,
    )
    lane_decode_share: float | None = option(
        None,
        "of the device",
        "What the decode lane keeps of the cores or streaming multiprocessors while both lanes have work, rounded to what "
        "the device can divide. Not set: the smallest of a few shares with which streams keep their target, as measured.",
        low=0.05,
        high=0.95,
    )
    lane_cudagraph_tokens: int = option(
        64,
        "tokens",
        "On GPUs, decode batches of up to this many tokens have CUDA graphs of their own while both lanes work, on every "
        "slot; larger ones run without. 0: none have.",
        low=0,
        high=8192,
    )
    lane_max_requests: int = option(
        2,
        "requests",
        "So many prompts hold KV blocks for the prefill lane at once; others wait their turn.",
        low=1,
        high=1024,
    )
    lane_restarts: int = option(
        3,
        "",
        "A prefill lane on CPUs that died is started again so often; after that everything is time-sliced. On GPUs it is not "
        "started again.",
        low=0,
        high=1000,
    )
    lane_start_timeout_s: float = option(
        600.0,
        "s",
        "A prefill lane on CPUs that has not loaded and compiled its model by then is ended. At the start of an engine that is "
        "an error, or with mode `auto` everything is time-sliced; later it counts as a lane that died.",
        low=1.0,
        high=86_400.0,
    )
    integrity_check_interval_s: float | None = option(
        None,
        "s",
        "An engine that has no request left checks its books, at most this often: KV blocks, queue, programs, lane. Faults are "
        "logged and counted (`integrity_faults`). It takes about half a millisecond per thousand KV blocks. Not set: never.",
        low=0.0,
        high=86_400.0,
    )
    stats_interval_ms: float = option(
        250.0,
        "ms",
        "Shortest time between two reports from the engine to `/metrics`.",
        low=0.0,
        high=60_000.0,
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
        if self.lower_threshold > self.upper_threshold:
            raise OptionError(
                f"{KEY} option 'lower_threshold' = {self.lower_threshold:g} is not allowed: it must be at most "
                f"'upper_threshold' = {self.upper_threshold:g}."
            )

    @property
    def bypass_steps(self) -> int:
        """`max_bypass_steps`, or its default under this policy."""
        return self.max_bypass_steps or (BYPASS_STEPS if self.policy == "fcfs" else PATIENT_BYPASS_STEPS)

    @property
    def batch_bypass_steps(self) -> int:
        return self.max_bypass_steps or PATIENT_BYPASS_STEPS

    @classmethod
    def from_mapping(cls, given: Any) -> "AgentServeConfig":
        """Builds the options from the value under the key `agentserve`; raises `OptionError` for anything not an option."""
        if not isinstance(given, Mapping):
            raise OptionError(
                f"additional_config[{KEY!r}] = {given!r} must be an object of options, for example "
                f'{{"{KEY}": {{"tpot_slo_ms": 40}}}}'
            )
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise OptionError(f"{KEY} has no option {name!r}.{hint} The options are: {', '.join(names)}.")
        return cls(**given)

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> "AgentServeConfig":
        """Builds the options from vLLM's `additional_config`; without the key `agentserve` all are at their defaults."""
        if not isinstance(additional_config, Mapping):
            return cls()
        return cls.from_mapping(additional_config.get(KEY, {}))


def option_table() -> str:
    """The options as a Markdown table; the documentation holds exactly this text, and a test compares the two."""
    return table_of(AgentServeConfig)


if __name__ == "__main__":
    print(option_table())
