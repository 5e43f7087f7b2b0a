"""Tokens of every mode against stock vLLM's: in bfloat16 as users run it, up to ties, and the same requests in float32."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from vllm_agentserve.gpucheck.check_run import PACKAGE, CheckRun, PartResult
from vllm_agentserve.gpucheck.compare import AnswerComparison, compare, wrong
from vllm_agentserve.gpucheck.engines import Setting, counters, make_engine, unused
from vllm_agentserve.gpucheck.scripted_requests import (
    Answers,
    ScriptedRequest,
    beside_requests,
    first_answers,
    from_json,
    mixed_requests,
    pinned_requests,
    run_requests,
    to_json,
)
from vllm_agentserve.shapes import TOY

ORDER = {
    "bfloat16": ("stock", "stock-chunk", "lanes", "time-sliced"),
    "float32": ("stock", "lanes", "time-sliced", "stock-chunk"),
}
"""Arms by dtype: those that decide most come first, should the time run out. In bfloat16 the control is needed too."""
LEAST_S = 15.0
"""An arm is begun when so much is left. What the one before took says little: the first waits for imports, and compiles."""
GRAPHS = {"bfloat16": True, "float32": False}
"""Whether decode steps are CUDA graphs: in bfloat16, with FlashAttention, all is as users run it; float32 is without either."""
CONTROL = "stock-chunk"
HARD = {"tpot_slo_ms": 15, "lane_min_tokens": 48, "lane_chunk_tokens": 64}
"""Options with which everything is cut into many chunks and most prompts go to the lane."""
CACHE_TOKENS = 4224
"""A KV cache so small that requests preempt one another."""


def engine_limits(device: str) -> dict[str, Any]:
    """Arguments of `LLM` that all engines of this part and of the faults share."""
    block = 16 if device == "cuda" else 128
    return {
        "max_model_len": 4096,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 4096,
        "block_size": block,
        "num_gpu_blocks_override": CACHE_TOKENS // block,
        "kv_cache_memory_bytes": 1 << 30,
    }


def setting(check: CheckRun, arm: str, dtype: str) -> Setting:
    return Setting(
        arm,
        TOY.name,
        dtype,
        check.device,
        str(check.folder),
        graphs=GRAPHS[dtype],
        options=HARD,
        engine=engine_limits(check.device),
    )


def requests_of(dtype: str, small: bool) -> list[ScriptedRequest]:
    """Sampling with seeds only in float32: in bfloat16 a difference of a sampled token is no tie and proves nothing. There
    the same requests come once more with pinned answers: contexts stay equal, so every position is compared."""
    free = mixed_requests(6 if small else 20, seeded=dtype == "float32")
    return free if dtype == "float32" else [*free, *later(pinned_requests(free), 2 * len(free))]


def later(requests: list[ScriptedRequest], steps: int) -> list[ScriptedRequest]:
    """The same requests, so many steps later."""
    return [replace(request, step=request.step + steps) for request in requests]


def answer(options: Mapping[str, Any]) -> dict[str, Any]:
    """One arm's answers to the mix and to `beside_requests`, in a child process."""
    given = Setting(**options["setting"])
    llm = make_engine(given)
    found = run_requests(llm.llm_engine, requests_of(given.dtype, options["small"]))
    found |= run_requests(llm.llm_engine, beside_requests())
    return {"answers": to_json(first_answers(found)), "counters": counters()}


def name_of(dtype: str, arm: str) -> str:
    return f"equality-{dtype}-{arm}"


def answers_of(check: CheckRun, dtype: str, arm: str) -> Answers | str:
    """The answers of an arm, from a child process of this check, an earlier one if there was; why there are none."""
    if "answers" in (found := check.raw(name_of(dtype, arm)) or {}):
        return from_json(found["answers"])
    options = {"setting": asdict(setting(check, arm, dtype)), "small": check.small}
    limit = None if arm == "stock" else check.patience_s
    ended = check.run(name_of(dtype, arm), f"{PACKAGE}.equality:answer", options, limit)
    return ended.error if ended.error is not None else from_json(ended.result["answers"])


def row(dtype: str, arm: str, comparison: AnswerComparison, lane_requests: int) -> str:
    margins = [one.margin for one in comparison.differences]
    shown = ", ".join("?" if margin is None else f"{margin:.4f}" for margin in margins[:6]) or "none"
    equal = f"{comparison.equal} of {comparison.compared}"
    apart = f"{comparison.noise:.2g}, {comparison.mean:.2g} ({comparison.positions})"
    return f"| {dtype} | {arm} | {equal} | {apart} | {shown} | {lane_requests} |"


def row_without_answers(dtype: str, arm: str, why: str) -> str:
    """The row of an arm that has none."""
    return f"| {dtype} | {arm} | {why} | | | |"


def run_bfloat16(check: CheckRun) -> PartResult:
    """The part that decides whether lanes work as users run them: FlashAttention, and decode steps as CUDA graphs."""
    return run(check, "bfloat16")


def run_float32(check: CheckRun) -> PartResult:
    """The part without rounding to hide behind."""
    return run(check, "float32")


def run(check: CheckRun, dtype: str) -> PartResult:
    """Every arm's answers in this dtype against stock's."""
    page = [
        "| dtype | arm | requests with stock's tokens | log-probabilities apart: most, mean (n) | "
        "margin of the first other token | requests of the lane |",
        "|---" * 6 + "|",
    ]
    problems: list[str] = []
    figures: dict[str, Any] = {}
    found: dict[str, Answers] = {}
    compared: dict[str, AnswerComparison] = {}
    requests = [*requests_of(dtype, check.small), *beside_requests()]
    for arm in ORDER[dtype]:
        if arm == CONTROL and dtype == "float32" and check.device == "cpu":
            # Its CPU runner takes back the draws of a prompt that is cut by a call that CPU generators lack.
            page.append(
                row_without_answers(dtype, arm, "not run: vLLM on CPUs cannot cut prompts that sample with a seed")
            )
            continue
        if check.left_s() < LEAST_S:
            page.append(row_without_answers(dtype, arm, "not run: the time was used up"))
            continue
        answers = answers_of(check, dtype, arm)
        if isinstance(answers, str):
            late = check.ran_out(name_of(dtype, arm))
            problems += [] if late else [f"{dtype} {arm}: no answers"]
            page.append(row_without_answers(dtype, arm, "ran out of time" if late else "failed"))
            figures[name_of(dtype, arm)] = {"error": answers}
            if arm == "stock":
                break
            continue
        found[arm] = answers
        if arm != "stock":
            compared[arm] = compare(found["stock"], answers, requests)
            counts = check.raw(name_of(dtype, arm))["counters"]
            figures[name_of(dtype, arm)] = asdict(compared[arm]) | {"counters": counts}
            page.append(row(dtype, arm, compared[arm], counts.get("lane_requests", 0)))
    control = compared.pop(CONTROL, None)
    # Without the control there is no verdict in bfloat16: a tie looks like a fault.
    judged = {} if control is None and dtype != "float32" else compared
    for arm, comparison in judged.items():
        why = wrong(comparison, control)
        if why is None and arm == "lanes":
            why = unused(figures[name_of(dtype, arm)]["counters"])
        if why is not None:
            problems.append(f"{dtype} {arm}: {why}")
    page += errors_of(figures)
    if problems:
        return PartResult("failed", "; ".join(problems), page, figures)
    if not judged:
        return PartResult("ran out of time", "the time was used up before two arms had answered", page, figures)
    exact = all(one.equal == one.compared for one in [*judged.values(), *([control] if control is not None else [])])
    line = "all tokens are stock's" if exact else "all tokens are stock's, up to ties that stock has with itself"
    return PartResult("ok", f"{line} ({len(judged)} of {len(ORDER[dtype]) - 2} comparisons)", page, figures)


def errors_of(figures: Mapping[str, Any]) -> list[str]:
    """The last lines of every child that failed, as Markdown."""
    page: list[str] = []
    for name, one in figures.items():
        if "error" in one:
            page += ["", f"`{name}`:", "", "```", *one["error"].splitlines(), "```"]
    return page
