"""Throughput against the share of the device: decode, cold prefill and resume prefill (Figure 3 of AgentServe)."""

from dataclasses import asdict
from typing import Any

from vllm_agentserve.gpucheck.check_run import PACKAGE, CheckRun, PartResult
from vllm_agentserve.gpucheck.environment import free_gib
from vllm_agentserve.gpucheck.step_kinds import LAYERS
from vllm_agentserve.shapes import shape_for


def table(points: list[dict[str, Any]], unit: str) -> list[str]:
    """One row per share: tokens per second of each work, and its part of what the largest share gives."""
    works = list(dict.fromkeys(point["work"] for point in points))
    units = sorted({point["units"] for point in points})
    at = {(point["work"], point["units"]): point["tokens_per_s"] for point in points}
    lines = [
        f"| {unit} | " + " | ".join(f"{work} (tokens/s)" for work in works) + " |",
        "|---:|" + "---:|" * len(works),
    ]
    for count in units:
        cells = [f"{at[work, count]:.4g} ({at[work, count] / at[work, units[-1]]:.0%})" for work in works]
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return lines


def run(check: CheckRun) -> PartResult:
    """The part."""
    # Where it is not known how much fits, what fits everywhere: the toy would measure launches.
    free = free_gib(check)
    shape = shape_for(0.0 if free is None and check.device == "cuda" else free)
    options = {"shape": asdict(shape), "device": check.device, "small": check.small}
    ended = check.run("shares", f"{PACKAGE}.decoder_layers:measure", options, fresh=True)
    if ended.error is not None:
        return PartResult(ended.status, "throughput was not measured", ["```", *ended.error.splitlines(), "```"])
    points, unit = ended.result["points"], ended.result["unit"]
    page = [
        f"{LAYERS} layers of the sizes of `{shape.name}`, in plain torch; in brackets the part of the largest share.",
        "",
    ]
    page += table(points, unit)
    units = sorted({point["units"] for point in points})
    if check.device == "cpu":
        page += ["", "Shares of multiprocessors: not run: no CUDA device."]
    return PartResult("ok", f"{len(points)} points on {units[0]} to {units[-1]} {unit}", page, ended.result)
