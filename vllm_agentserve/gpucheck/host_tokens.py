"""Tokens with host memory behind the KV cache against stock vLLM's: contexts that the cache drops, and that come back."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vllm_agentserve.gpucheck.check_run import PACKAGE, CheckRun, PartResult
from vllm_agentserve.gpucheck.compare import AnswerComparison, compare, wrong
from vllm_agentserve.gpucheck.engines import Setting, counters, make_engine
from vllm_agentserve.gpucheck.equality import CONTROL, GRAPHS, LEAST_S, engine_limits, errors_of, row_without_answers
from vllm_agentserve.gpucheck.scripted_requests import (
    Answers,
    ScriptedRequest,
    first_answers,
    from_json,
    greedy,
    long_prompt,
    run_requests,
    to_json,
)
from vllm_agentserve.shapes import TOY

HOSTS: Mapping[str, Mapping[str, Any]] = {
    "host": {"kv_host_gib": 0.5, "kv_host_policy": "lru"},
    "host-program": {"kv_host_gib": 0.03},
}
"""Our options by arm: room for all contexts, with vLLM's own policy, and for about half of them, with ours."""
SLO = {"tpot_slo_ms": 15}
"""Prompts are cut into many chunks."""
ORDER: Mapping[str, Sequence[str]] = {"float32": ("stock", *HOSTS), "bfloat16": ("stock", CONTROL, "host")}
"""Arms by dtype, the dtype without rounding first."""
SMALL = {"float32": ORDER["float32"][:2]}
TURNS = 3
TURN_STEPS = 150
"""Engine steps from one turn of all contexts to the next."""


def returning_requests(contexts: int) -> list[ScriptedRequest]:
    """Every context comes back twice, with more tokens at its end; together they do not fit into the KV cache.

    Every other context has answers that are known beforehand, since only one token is allowed in them: it goes on from its
    answers. One in seven is aborted after the first token of its second turn.
    """
    requests = []
    for number in range(contexts):
        pinned = [5 + 131 * number] if number % 2 == 0 else None
        prompt = long_prompt(number, 500 + 40 * (number % 5))
        for turn in range(TURNS):
            tokens = 24 + number % 3
            abort_after = 1 if number % 7 == 3 and turn == 1 else None
            parameters = greedy(tokens, **({"allowed_token_ids": pinned} if pinned else {}))
            # The order of contexts changes from turn to turn.
            step = turn * TURN_STEPS + (number * (2 * turn + 1)) % contexts
            requests.append(ScriptedRequest(f"context-{number}-{turn}", step, tuple(prompt), parameters, abort_after))
            prompt = [*prompt, *(pinned * tokens if pinned else []), *long_prompt(contexts * (turn + 1) + number, 70)]
    return requests


def requests_of(small: bool) -> list[ScriptedRequest]:
    return returning_requests(10 if small else 16)


def order_for(check: CheckRun) -> Mapping[str, Sequence[str]]:
    return SMALL if check.small else ORDER


def setting(check: CheckRun, arm: str, dtype: str) -> Setting:
    return Setting(
        "time-sliced" if arm in HOSTS else arm,
        TOY.name,
        dtype,
        check.device,
        str(check.folder),
        graphs=GRAPHS[dtype],
        options={**SLO, **HOSTS.get(arm, {})},
        engine=engine_limits(check.device),
    )


def answer(options: Mapping[str, Any]) -> dict[str, Any]:
    """One arm's answers, in a child process."""
    llm = make_engine(Setting(**options["setting"]))
    found = run_requests(llm.llm_engine, requests_of(options["small"]))
    return {"answers": to_json(first_answers(found)), "counters": counters()}


def unused(counts: Mapping[str, float]) -> str | None:
    """Why an arm says nothing about host memory; None when contexts came back from it."""
    return None if counts.get("host_restored_requests") else "no context came back from host memory"


def row(dtype: str, arm: str, comparison: AnswerComparison, counts: Mapping[str, float]) -> str:
    equal = f"{comparison.equal} of {comparison.compared}"
    apart = f"{comparison.noise:.2g}, {comparison.mean:.2g} ({comparison.positions})"
    restored, stored = (counts.get(name, 0) for name in ("host_restored_requests", "host_stored_tokens"))
    return f"| {dtype} | {arm} | {equal} | {apart} | {restored:g} | {stored:g} |"


def run(check: CheckRun) -> PartResult:
    """The part: every arm's answers against stock's, in float32, then in bfloat16 with CUDA graphs."""
    page = [
        "| dtype | arm | requests with stock's tokens | log-probabilities apart: most, mean (n) | "
        "prompts that came back from host memory | tokens stored there |",
        "|---" * 6 + "|",
    ]
    problems: list[str] = []
    figures: dict[str, Any] = {}
    judged: dict[str, AnswerComparison] = {}
    for dtype, arms in order_for(check).items():
        found: dict[str, Answers] = {}
        compared: dict[str, AnswerComparison] = {}
        for arm in arms:
            name = f"host-{dtype}-{arm}"
            if check.left_s() < LEAST_S:
                page.append(row_without_answers(dtype, arm, "not run: the time was used up"))
                continue
            options = {"setting": asdict(setting(check, arm, dtype)), "small": check.small}
            limit = None if arm == "stock" else check.patience_s
            ended = check.run(name, f"{PACKAGE}.host_tokens:answer", options, limit)
            if ended.error is not None:
                problems += [] if ended.out_of_time else [f"{dtype} {arm}: no answers"]
                page.append(row_without_answers(dtype, arm, "ran out of time" if ended.out_of_time else "failed"))
                figures[name] = {"error": ended.error}
                if arm == "stock":
                    break
                continue
            found[arm] = from_json(ended.result["answers"])
            if arm != "stock":
                compared[arm] = compare(found["stock"], found[arm], requests_of(check.small))
                counts = ended.result["counters"]
                figures[name] = asdict(compared[arm]) | {"counters": counts}
                page.append(row(dtype, arm, compared[arm], counts))
        control = compared.pop(CONTROL, None)
        # Without the control there is no verdict in bfloat16: a tie looks like a fault.
        for arm, comparison in ({} if control is None and dtype != "float32" else compared).items():
            why = wrong(comparison, control) or unused(figures[f"host-{dtype}-{arm}"]["counters"])
            problems += [f"{dtype} {arm}: {why}"] if why else []
            judged[f"{dtype} {arm}"] = comparison
    page += errors_of(figures)
    if problems:
        return PartResult("failed", "; ".join(problems), page, figures)
    if not judged:
        return PartResult("ran out of time", "the time was used up before two arms had answered", page, figures)
    exact = all(one.exact for one in judged.values())
    line = "all tokens are stock's" if exact else "all tokens are stock's, up to ties that stock has with itself"
    wanted = sum(len(HOSTS.keys() & set(arms)) for arms in order_for(check).values())
    return PartResult("ok", f"{line} ({len(judged)} of {wanted} comparisons)", page, figures)
