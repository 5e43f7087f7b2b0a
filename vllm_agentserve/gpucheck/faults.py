"""What becomes of the tokens when a client goes away while the lane works, when one chunk raises, and when three in a row do."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vllm_agentserve.gpucheck.check_run import PACKAGE, CheckRun, PartResult
from vllm_agentserve.gpucheck.compare import AnswerComparison, compare, wrong
from vllm_agentserve.gpucheck.engines import Setting, counters, make_engine
from vllm_agentserve.gpucheck.equality import CONTROL, engine_limits, name_of, requests_of, setting
from vllm_agentserve.gpucheck.scripted_requests import (
    Answers,
    beside_requests,
    first_answers,
    from_json,
    run_requests,
    to_json,
)
from vllm_agentserve.processes.task import ChildResult

DTYPES = ("bfloat16", "float32")
"""The first as users run it, with CUDA graphs and up to ties; the second exactly, if time is left."""
LEAST_TOKENS = 1000
"""Chunks that raise belong to jobs of at least so many tokens: the prompts of `beside_requests`, and no warm-up."""
TRIES = 4
"""So often the jobs are run until three chunks have raised in a row: one run has two long prompts, and a lane that has failed may
get none for a while."""
SPOILT, IN_A_ROW, RETIRED = "raise", "in a row", "retired"
"""Scenarios: one chunk raises; the runs in which all long jobs fail; and the one after them, without a lane."""


@dataclass
class LaneSpy:
    """Sees every job that the worker gives to its lane, and makes a chunk of it raise in the lane when told to.

    vLLM's own request ids begin with the given ones.

    Args:
        device: "cuda", where the lane is in this process: a chunk raises after it was launched. "cpu", where the lane is
            another process: a job gets tokens that are no numbers.
        spoil: how many chunks are still to raise; only of long jobs, and not the first chunk where there is a choice.
    """

    device: str
    spoil: int = 0
    seen: set[str] = field(default_factory=set)

    def attach(self) -> None:
        """Sits between worker and lane of every engine this process makes from now on."""
        from vllm_agentserve.lanes.connector_worker import LaneConnectorWorker

        before_step = LaneConnectorWorker.before_step

        def watched(worker: Any, jobs: Sequence[Any], *args: Any) -> None:
            before_step(worker, [self.passed(job) for job in jobs], *args)

        LaneConnectorWorker.before_step = watched  # type: ignore[method-assign,assignment]
        if self.device == "cuda":
            from vllm_agentserve.vllm_compat.cuda_runner import LaneModelRunner

            run = LaneModelRunner.run

            def launched(runner: Any, chunk: Any) -> object:
                kept = run(runner, chunk)
                if not chunk.first and self._strikes(chunk.job):
                    raise RuntimeError("planted by the check")
                return kept

            LaneModelRunner.run = launched  # type: ignore[method-assign,assignment]

    def has_seen(self, request: str) -> bool:
        return any(name.startswith(request) for name in self.seen)

    def passed(self, job: Any) -> Any:
        """The job as the lane gets it."""
        self.seen.add(job.request_id)
        if self.device == "cpu" and self._strikes(job):
            return replace(job, token_ids=["not a number"] * len(job.token_ids))
        return job

    def _strikes(self, job: Any) -> bool:
        """Whether this one is to raise; counts it."""
        if not self.spoil or len(job.token_ids) < LEAST_TOKENS:
            return False
        self.spoil -= 1
        return True


def scenarios(options: Mapping[str, Any]) -> dict[str, Any]:
    """All of them with one engine, in a child process. The abort comes first, since a failure leaves no lane for a while, and
    the failures in a row last, since they leave none at all."""
    from vllm_agentserve.lanes.connector_worker import FAILURES_IN_A_ROW

    setting = Setting(**options["setting"])
    spy = LaneSpy(setting.device)
    spy.attach()
    llm = make_engine(setting)
    engine = llm.llm_engine
    results: dict[str, Any] = {}

    def scenario(name: str, before_step: Any = lambda step: None) -> None:
        llm.reset_prefix_cache()
        before = counters()
        answers = first_answers(run_requests(engine, beside_requests(), f"{name}-", before_step))
        gained = {key: value - before.get(key, 0) for key, value in counters().items()}
        results[name] = {"answers": to_json(answers), "gained": gained}

    aborted: list[str] = []

    def abort_once(step: int) -> None:
        if spy.has_seen("abort-cold-0") and not aborted:
            aborted.append("cold-0")
            engine.abort_request(["abort-cold-0"])

    scenario("plain")
    scenario("abort", abort_once)
    spy.spoil = 1
    scenario(SPOILT)
    scenario("after")
    found = {"scenarios": results, "aborted": aborted, "spoilt": 1 - spy.spoil, "in_a_row": None}
    if setting.device == "cpu":
        # A chunk that raises there ends the lane's process, and another one is started.
        return found
    spy.spoil = FAILURES_IN_A_ROW
    for number in range(1, TRIES + 1):
        scenario(f"{IN_A_ROW} {number}")
        if not spy.spoil:
            break
    left, spy.spoil = spy.spoil, 0
    scenario(RETIRED)
    return found | {"in_a_row": FAILURES_IN_A_ROW - left, "wanted": FAILURES_IN_A_ROW}


def judge(reference: Answers, found: Mapping[str, Any], control: AnswerComparison | None = None) -> list[str]:
    """What is wrong with the results of `scenarios` up to the one chunk that raised; nothing when all is well.

    Args:
        reference: stock's answers.
        control: as for `compare.wrong`; without it every token has to be stock's.
    """
    problems = []
    for name, one in found["scenarios"].items():
        missing = set(found["aborted"]) if name == "abort" else set()
        requests = [request for request in beside_requests() if request.name not in missing]
        comparison = compare(reference, from_json(one["answers"]), requests)
        if control is not None:
            if (why := wrong(comparison, control)) is not None:
                problems.append(f"{name}: {why}")
        elif not comparison.exact:
            problems.append(
                f"{name}: {comparison.compared - comparison.equal} of {comparison.compared} have other tokens"
            )
    gained = {name: one["gained"] for name, one in found["scenarios"].items()}
    if not gained["plain"].get("lane_requests"):
        problems.append("no prompt went to the lane")
    for name, one in gained.items():
        if (failed := one.get("lane_failed_requests")) and name != SPOILT and not name.startswith(IN_A_ROW):
            problems.append(f"{name}: the lane failed on {failed} prompts, and nothing was planted")
    if not found["aborted"]:
        problems.append("nothing was aborted, for the lane got no prompt")
    if not found["spoilt"] or not gained[SPOILT].get("lane_failed_requests"):
        problems.append("no chunk raised in the lane")
    return problems


def judge_retired(found: Mapping[str, Any]) -> list[str]:
    """What is wrong with the end of the lane after failures in a row; the tokens are for `judge`."""
    if found["in_a_row"] is None:
        return []
    gained = {name: one["gained"] for name, one in found["scenarios"].items()}
    failed = sum(one.get("lane_failed_requests", 0) for name, one in gained.items() if name.startswith(IN_A_ROW))
    if min(found["in_a_row"], failed) < found["wanted"]:
        return [f"only {min(found['in_a_row'], failed)} of {found['wanted']} chunks raised in a row"]
    if asked := gained[RETIRED].get("lane_requests"):
        return [f"the lane got {asked} prompts after {failed} failures in a row"]
    return []


def reference_of(check: CheckRun, dtype: str, arm: str) -> Answers | ChildResult:
    """The answers of an arm of the equality part, from that part where it has run."""
    found = check.raw(name_of(dtype, arm))
    if found is None:
        options = {"setting": asdict(setting(check, arm, dtype)), "small": check.small}
        ended = check.run(name_of(dtype, arm), f"{PACKAGE}.equality:answer", options)
        if ended.error is not None:
            return ended
        found = ended.result
    return from_json(found["answers"])


def ended_early(dtype: str, line: str, ended: ChildResult) -> PartResult:
    """One dtype without a verdict."""
    page = ["", f"{dtype}:", "", "```", *str(ended.error).splitlines(), "```"]
    return PartResult(ended.status, f"{dtype}: {line}", page)


def run_one(check: CheckRun, dtype: str) -> PartResult:
    """All scenarios in one dtype."""
    reference = reference_of(check, dtype, "stock")
    if isinstance(reference, ChildResult):
        return ended_early(dtype, "stock vLLM gave no reference", reference)
    control = None
    if dtype != "float32":
        other = reference_of(check, dtype, CONTROL)
        if isinstance(other, ChildResult):
            return ended_early(dtype, f"{CONTROL} gave no reference", other)
        # All requests of that part tell what rounding can turn, but their mean is not that of the few looked at here.
        control = compare(reference, other, [*requests_of(dtype, check.small), *beside_requests()])
        control = replace(control, mean=math.inf)
    given = setting(check, "lanes", dtype)
    # A cache with room: what is looked at here is the lane, not preemption.
    blocks = 2 * engine_limits(check.device)["num_gpu_blocks_override"]
    given = replace(given, engine={**given.engine, "num_gpu_blocks_override": blocks})
    ended = check.run(f"faults-{dtype}", f"{PACKAGE}.faults:scenarios", {"setting": asdict(given)}, check.patience_s)
    if ended.error is not None:
        return ended_early(dtype, "the engine did not survive it", ended)
    found = ended.result
    problems = judge(reference, found, control) + judge_retired(found)
    page = []
    for name, one in found["scenarios"].items():
        gained = one["gained"]
        page.append(
            f"| {dtype} | {name} | {gained.get('lane_requests', 0)} | {gained.get('lane_failed_requests', 0)} |"
        )
    figures = {name: one["gained"] for name, one in found["scenarios"].items()}
    if problems:
        return PartResult("failed", "; ".join(f"{dtype}: {one}" for one in problems), page, figures)
    return PartResult("ok", dtype, page, figures)


def run(check: CheckRun) -> PartResult:
    """The part: all scenarios in every dtype that there is time for."""
    found: dict[str, PartResult] = {}
    before = check.left_s()
    for dtype in DTYPES:
        # The second needs a reference of its own, so twice as long as the first.
        if found and check.left_s() < 2 * (before - check.left_s()):
            break
        found[dtype] = run_one(check, dtype)
    page = ["| dtype | scenario | requests of the lane | of these failed and computed again |", "|---|---|---|---|"]
    for status in ("ok", "failed", "ran out of time"):
        page += [line for one in found.values() for line in one.page if one.status == status]
    figures = {dtype: one.figures for dtype, one in found.items()}
    if failed := [one.line for one in found.values() if one.status == "failed"]:
        return PartResult("failed", "; ".join(failed), page, figures)
    passed = [dtype for dtype, one in found.items() if one.status == "ok"]
    if not passed:
        return PartResult("ran out of time", "; ".join(one.line for one in found.values()), page, figures)
    row = ", and three in a row, which retire the lane" if check.device == "cuda" else ""
    line = f"all tokens are stock's after an abort and a chunk that raised{row}"
    if not row:
        page += ["", "Three chunks that raise in a row: not run: no CUDA device."]
    late = "".join(f"; {dtype}: too little time" for dtype in DTYPES if dtype not in passed)
    return PartResult("ok", f"{line}, in {' and in '.join(passed)}{late}", page, figures)
