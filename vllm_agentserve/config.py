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
        "How prefill and decode share the device. `time-sliced`: each step runs all decodes and as much prefill as the "
        "target allows. `lanes`: as `time-sliced`, but while other requests decode, prompts with at least "
        "`lane_min_tokens` uncached tokens are computed in parallel, on their own cores or streaming multiprocessors "
        "(experimental on GPUs). `auto`: for each prompt, the one of the two that is measured to be faster within the "
        "target; `time-sliced` where lanes cannot run or cannot be faster, and the log says why. `stock`: vLLM's own "
        "order and chunks, with our metrics.",
    )
    tpot_slo_ms: float | None = option(
        None,
        "ms",
        "Target for the time between two tokens of a stream while prompts are computed; it does not depend on how many "
        "prompts wait. Not set: `tpot_factor` times the median decode step measured without prefill, and more while many "
        "prompts wait and few streams decode, up to 0.55 of the step that stock vLLM would run.",
        low=1.0,
        high=60_000.0,
    )
    tpot_factor: float = option(
        5.0, "x", "Factor of the smallest target when `tpot_slo_ms` is not set.", low=1.1, high=1000.0
    )
    tpot_uncalibrated_ms: float = option(
        50.0,
        "ms",
        "Target until the first decode steps without prefill have been measured. No effect when `tpot_slo_ms` is set.",
        low=1.0,
        high=60_000.0,
    )
    upper_threshold: float = option(
        1.0,
        "x target",
        "The controller shrinks the prefill chunk and the resume budget when the slowest tenth of the steps with prefill "
        "is above this.",
        low=0.1,
        high=10.0,
    )
    lower_threshold: float = option(
        0.93,
        "x target",
        "The controller grows them when the slowest tenth is below this. Between the two thresholds it changes nothing.",
        low=0.1,
        high=10.0,
    )
    prefill_floor_tokens: int = option(
        16,
        "tokens",
        "In every step a cold prefill advances by at least this many tokens, and so do all resume prefills together "
        "and all prompts that make way for better ones, whatever the target.",
        low=1,
        high=65_536,
    )
    resume_budget_max_tokens: int = option(
        1024,
        "tokens",
        "Upper bound of the resume budget. While anybody decodes, a resume prefill with more uncached tokens than the budget "
        "is queued with the cold prefills.",
        low=16,
        high=1_048_576,
    )
    first_chunk_tokens: int = option(
        32,
        "tokens",
        "Largest prefill chunk in a step with decodes before the step-time model has measured any. Later chunks are at "
        "most twice the largest one measured.",
        low=1,
        high=65_536,
    )
    chunk_granularity_tokens: int = option(
        8,
        "tokens",
        "Steps with decodes and prefill are rounded down to multiples of this many tokens, and to eight sizes per octave. "
        "Fewer sizes mean less warm-up of kernel libraries.",
        low=1,
        high=4096,
    )
    warm_up_s: float = option(
        10.0,
        "s",
        "Longest time at start in which the worker runs steps of the sizes that service will have, the smallest first: kernel "
        "libraries prepare themselves for each. Two steps that draw tokens come before, and are not counted. On CPUs only; vLLM "
        "warms up GPUs itself. 0: none.",
        low=0.0,
        high=3600.0,
    )
    max_bypass_steps: int | None = option(
        None,
        "steps",
        "A waiting request that others have overtaken for this many engine steps goes to the front of the queue. Not set: "
        "64, or 4096 with policy `plas` or `atlas` and for requests of class `batch`.",
        low=1,
        high=1_000_000,
    )
    load_control: bool = option(
        True,
        "",
        "Hold the first call of a program back while the contexts of the programs under way fill the KV cache, if that "
        "gives more turns per second.",
    )
    max_hold_s: float = option(
        480.0,
        "s",
        "Longest time load control holds a call back.",
        low=0.0,
        high=86_400.0,
    )
    kv_retain: bool = option(
        False,
        "",
        "Keep the KV blocks of programs that are expected back, up to three quarters of the KV cache: they are handed out only "
        "when nothing else is left. Not with models whose layers differ in what they keep, nor without prefix caching.",
    )
    kv_reserve_share: float = option(
        0.0,
        "of the KV cache",
        "Largest share of the KV cache that is reserved for calls with the hint `agent_critical`, while there are any. It begins "
        "at 0.05, and follows how much of the cache is in use. The contexts of their programs are kept as with `kv_retain`. Not "
        "with models whose layers differ in what they keep, nor without prefix caching. 0: such calls only go before others.",
        low=0.0,
        high=0.9,
    )
    kv_host_gib: float = option(
        0.0,
        "GiB",
        "Size of host memory behind the KV cache: what the cache drops of contexts is copied back from there instead of being "
        "computed again. vLLM's OffloadingConnector keeps it; every engine of a server has its own. Not with lanes, another KV "
        "connector, `--kv-offloading-size`, or without prefix caching. 0: none.",
        low=0.0,
        high=65_536.0,
    )
    kv_host_policy: typing.Literal["program", "lru", "arc"] = option(
        "program",
        "",
        "Which copies make room in host memory, where it is too small for all that come back. `program`: whole contexts, first "
        "those of programs that are not expected back, then of the one that is expected back last. `lru`, vLLM's own: those not "
        "used for longest. `arc`, vLLM's own: by how lately and how often they were used.",
    )
    strict_hints: bool = option(
        False,
        "",
        "Refuse a request with an invalid hint (`agent_parent`, `agent_thread`, `agent_deadline_ms`, "
        "`agent_last`, `agent_tool`, `agent_class`, `agent_session`, `agent_previous`, `agent_priority`, "
        "`agent_critical`, `agentic_context`, `agent_hint` in `vllm_xargs`, and the headers of clients) with status 400. Off: "
        "the hint is ignored and counted.",
    )
    client_names: bool = option(
        True,
        "",
        "Read the names of sessions and sub-agents that Claude Code, Codex, OpenCode, Dynamo and vLLM Router send, from headers "
        "and bodies. Off: only `session_id`, `X-Session-ID` and `vllm_xargs`.",
    )
    policy: typing.Literal["fcfs", "plas", "atlas"] = option(
        "fcfs",
        "",
        "Order of waiting requests. `fcfs`: resume prefills first, then cold prefills, those of the program that began first. "
        "`plas`: programs that have received the least service first. `atlas`: the same, with the longest path of calls "
        "that led to the request as its service. A program is a `session_id`, or else the requests whose prompts "
        "continue each other's answers.",
    )
    program_levels: int = option(
        8,
        "",
        "Number of service levels of `plas` and `atlas`. Within a level the order is that of `fcfs`.",
        low=1,
        high=64,
    )
    program_quantum_ms: float = option(
        500.0,
        "ms",
        "Engine time up to which a program is at the first level. Every further level is twice as wide as the one before.",
        low=1.0,
        high=3_600_000.0,
    )
    program_promote_ratio: float = option(
        10.0,
        "x service",
        "A call that has waited this many times the service of its program (or this many quanta, if that is less) moves "
        "to the first level. All its waits are added up; the time in which it ran is not.",
        low=0.1,
        high=100_000.0,
    )
    program_preempt_share: float = option(
        0.0,
        "of service",
        "With `plas` or `atlas`, a waiting call may preempt a running call of a worse level when no more requests can "
        "run, as long as the work that has to be repeated stays below this share of the service. What is left of that "
        "share is kept for five minutes of service. 0: never.",
        low=0.0,
        high=0.5,
    )
    program_ttl_s: float = option(
        3600.0, "s", "A program without a call for this long is forgotten.", low=1.0, high=1_000_000.0
    )
    lane_min_tokens: int = option(
        512,
        "tokens",
        "A prompt with at least this many uncached tokens may go to the prefill lane while other requests decode.",
        low=16,
        high=1_048_576,
    )
    lane_chunk_tokens: int | None = option(
        None,
        "tokens",
        "Chunk size of the prefill lane on its smallest share of the device; larger shares get larger chunks. Between two "
        "chunks the share may change, and the lane may switch to another prompt. Not set: 256 on CPUs, 1024 on GPUs.",
        low=16,
        high=65_536,
    )
    lane_decode_share: float | None = option(
        None,
        "of the device",
        "Share of the cores or streaming multiprocessors that the decode lane keeps while both lanes have work, rounded "
        "to what the device can divide. Not set: the smallest of a few shares with which streams are measured to meet the "
        "target.",
        low=0.05,
        high=0.95,
    )
    lane_cudagraph_tokens: int = option(
        64,
        "tokens",
        "On GPUs, decode batches of up to this many tokens run as CUDA graphs while both lanes work, captured for every "
        "slot; larger ones run without. 0: no graphs.",
        low=0,
        high=8192,
    )
    lane_max_requests: int = option(
        2,
        "requests",
        "Number of prompts that may hold KV blocks for the prefill lane at once. Others wait.",
        low=1,
        high=1024,
    )
    lane_restarts: int = option(
        3,
        "",
        "How often a prefill lane on CPUs is restarted after it died. After that everything is time-sliced. On GPUs it is "
        "not restarted.",
        low=0,
        high=1000,
    )
    lane_start_timeout_s: float = option(
        600.0,
        "s",
        "Time in which a prefill lane on CPUs must have loaded and compiled its model. If it has not, it is ended: at "
        "engine start that is an error (mode `auto`: everything is time-sliced), later it counts as a lane that died.",
        low=1.0,
        high=86_400.0,
    )
    integrity_check_interval_s: float | None = option(
        None,
        "s",
        "Check the scheduler's state (KV blocks, queue, programs, lane) when no request is left, at most this often. "
        "Faults are logged and counted (`integrity_faults`). It takes about half a millisecond per thousand KV blocks. "
        "Not set: never.",
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

    @property
    def hosts_programs(self) -> bool:
        """Whether programs decide what host memory keeps."""
        return self.kv_host_gib > 0 and self.kv_host_policy == "program"

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
