"""What becomes of the tokens when a chunk of the lane raises, and when a client goes away while the lane works."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vllm_agentserve.gpucheck.compare import compare
from vllm_agentserve.gpucheck.engines import Setting, counters, make_engine
from vllm_agentserve.gpucheck.equality import answers_of, engine_limits, name_of, setting
from vllm_agentserve.gpucheck.jobs import Answers, beside_jobs, from_json, run_jobs, to_json
from vllm_agentserve.gpucheck.place import PACKAGE, Finding, Place

DTYPE = "float32"
LEAST_TOKENS = 1000
"""The jobs whose chunks raise have at least so many: the prompts of `beside_jobs`, and no warm-up."""


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
        from vllm_agentserve.lanes.worker import LaneWorker

        before_step = LaneWorker.before_step

        def watched(worker: Any, jobs: Sequence[Any], *args: Any) -> None:
            before_step(worker, [self.passed(job) for job in jobs], *args)

        LaneWorker.before_step = watched  # type: ignore[method-assign,assignment]
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
    """All of them with one engine, in a child process. The abort comes first: a failure leaves no lane for a while."""
    setting = Setting(**options["setting"])
    spy = LaneSpy(setting.device)
    spy.attach()
    llm = make_engine(setting)
    engine = llm.llm_engine
    results: dict[str, Any] = {}

    def scenario(name: str, before_step: Any = lambda step: None) -> None:
        llm.reset_prefix_cache()
        before = counters(llm)
        answers = run_jobs(engine, beside_jobs(), f"{name}-", before_step)
        gained = {key: value - before.get(key, 0) for key, value in counters(llm).items()}
        results[name] = {"answers": to_json(answers), "gained": gained}

    aborted: list[str] = []

    def abort_once(step: int) -> None:
        if spy.has_seen("abort-cold-0") and not aborted:
            aborted.append("cold-0")
            engine.abort_request(["abort-cold-0"])

    scenario("plain")
    scenario("abort", abort_once)
    spy.spoil = 1
    scenario("raise")
    scenario("after")
    return {"scenarios": results, "aborted": aborted, "spoilt": 1 - spy.spoil}


def judge(reference: Answers, found: Mapping[str, Any]) -> list[str]:
    """What is wrong with the results of `scenarios`; nothing when all is well."""
    problems = []
    for name, one in found["scenarios"].items():
        missing = set(found["aborted"]) if name == "abort" else set()
        jobs = [job for job in beside_jobs() if job.name not in missing]
        comparison = compare(reference, from_json(one["answers"]), jobs)
        if not comparison.exact:
            problems.append(
                f"{name}: {comparison.compared - comparison.equal} of {comparison.compared} have other tokens"
            )
    gained = {name: one["gained"] for name, one in found["scenarios"].items()}
    if not gained["plain"].get("lane_requests"):
        problems.append("no prompt went to the lane")
    if not found["aborted"]:
        problems.append("nothing was aborted, for the lane got no prompt")
    if not found["spoilt"] or not gained["raise"].get("lane_failed_requests"):
        problems.append("no chunk raised in the lane")
    return problems


def run(place: Place) -> Finding:
    """The part; takes stock's answers from the equality part where they are there."""
    told = place.raw(name_of(DTYPE, "stock"))
    reference = from_json(told["answers"]) if told is not None else answers_of(place, DTYPE, "stock")
    if isinstance(reference, str):
        return Finding("failed", "stock vLLM gave no reference", ["```", *reference.splitlines(), "```"])
    # A cache with room: what is looked at here is the lane, not preemption.
    given = setting(place, "lanes", DTYPE)
    blocks = 2 * engine_limits(place.device)["num_gpu_blocks_override"]
    given = replace(given, engine={**given.engine, "num_gpu_blocks_override": blocks})
    ended = place.run("faults", f"{PACKAGE}.faults:scenarios", {"setting": asdict(given)})
    if ended.error is not None:
        return Finding("failed", "the engine did not live through it", ["```", *ended.error.splitlines(), "```"])
    problems = judge(reference, ended.result)
    page = ["| scenario | requests of the lane | of these failed and computed again |", "|---|---|---|"]
    for name, one in ended.result["scenarios"].items():
        gained = one["gained"]
        page.append(f"| {name} | {gained.get('lane_requests', 0)} | {gained.get('lane_failed_requests', 0)} |")
    figures = {name: one["gained"] for name, one in ended.result["scenarios"].items()}
    if problems:
        return Finding("failed", "; ".join(problems), page, figures)
    return Finding("ok", "all tokens are stock's after an abort and after a chunk that raised", page, figures)
