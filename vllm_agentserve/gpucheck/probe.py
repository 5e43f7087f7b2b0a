"""Green contexts on this GPU: which splits exist, whether two lanes share multiprocessors, and what a storm does to decode."""

from collections.abc import Mapping
from typing import Any

from vllm_agentserve.gpucheck.check_run import PACKAGE, CheckRun, PartResult


def trespasses(found: Mapping[str, Any]) -> list[str]:
    """Where work ran on multiprocessors that are not its own; nothing when all is well.

    Args:
        found: what `multiprocessors.probe` returned; its `seen` is not None.
    """
    problems = []
    for slot, seen in zip(found["slots"], found["seen"], strict=True):
        name = f"slot {slot['decode']}+{slot['prefill']}"
        decode, prefill, graph = set(seen["decode"]), set(seen["prefill"]), set(seen["graph"])
        if both := decode & prefill:
            problems.append(f"{name}: both lanes ran on {len(both)} multiprocessors")
        if len(decode) > slot["decode"] or len(prefill) > slot["prefill"]:
            problems.append(f"{name}: lanes ran on {len(decode)}+{len(prefill)} multiprocessors")
        if away := graph - decode:
            problems.append(f"{name}: a graph captured on the decode lane ran on {len(away)} others")
    return problems


def page_of(found: Mapping[str, Any]) -> list[str]:
    """The tables of the part, as Markdown."""
    lines = [
        f"{found['units']} multiprocessors, driver for CUDA {found['driver'] // 1000}.{found['driver'] % 1000 // 10}.",
        "",
    ]
    lines += ["| asked for | decode lane got | left for the prefill lane |", "|---:|---:|---:|"]
    for split in found["splits"]:
        cells = f"{split['got']} | {split['rest']}" if "got" in split else f"{split['error']} | "
        lines.append(f"| {split['asked']} | {cells} |")
    if found["seen"] is None:
        lines += ["", "Which multiprocessors were used was not seen: Triton is not installed."]
    else:
        lines += [
            "",
            "| slot | seen: decode | prefill | both | graph of the decode lane |",
            "|---|---:|---:|---:|---:|",
        ]
        for slot, seen in zip(found["slots"], found["seen"], strict=True):
            both = len(set(seen["decode"]) & set(seen["prefill"]))
            counts = f"{len(seen['decode'])} | {len(seen['prefill'])} | {both} | {len(seen['graph'])}"
            lines.append(f"| {slot['decode']}+{slot['prefill']} | {counts} |")
        lines += ["", f"An ordinary stream was seen on {len(found['seen_primary'])}."]
    lines += ["", "| decode-like chain | p50 (ms) | p99 (ms) | max (ms) | n | products of the storm per second |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {one['arm']} | {one['p50_ms']:.3f} | {one['p99_ms']:.3f} | {one['max_ms']:.3f} | {one['n']} | "
        f"{one['storm_per_s']:.4g} |"
        for one in found["arms"]
    ]
    return lines


def run(check: CheckRun) -> PartResult:
    """The part."""
    if check.device == "cpu":
        return PartResult("not run", "no CUDA device")
    ended = check.run("green", f"{PACKAGE}.multiprocessors:probe", {}, fresh=True)
    if ended.error is not None:
        return PartResult(ended.status, "the probe did not come to its end", ["```", *ended.error.splitlines(), "```"])
    found, page = ended.result, page_of(ended.result)
    p99 = {one["arm"]: one["p99_ms"] for one in found["arms"]}
    times = "chain p99: " + ", ".join(f"{name} {value:.3g} ms" for name, value in list(p99.items())[:5])
    if found["seen"] is None:
        return PartResult("not run", f"isolation was not seen, Triton is not installed; {times}", page, found)
    if problems := trespasses(found):
        return PartResult("failed", "; ".join(problems), page, found)
    return PartResult("ok", f"lanes are disjoint and graphs stay on theirs; {times}", page, found)
