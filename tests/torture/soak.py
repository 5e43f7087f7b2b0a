"""The soak: one engine for an hour under episodes of the torture rig, every answer compared, its memory looked at after each.

    python -m tests.torture.soak --minutes 60 --output docs/results/soak.json --picture docs/results/soak.png
    python -m tests.torture.soak --mode none ...            # vLLM without our scheduler, to compare with

A fixed number of episodes is drawn and run in turn; sessions have new names every time. Exit code 1 if an answer is not
stock's or the scheduler's state does not agree.

glibc keeps freed memory for itself, the more the larger the freed parts were, so that resident memory says little of what is
in use: it is told to give parts of a megabyte and more back at once (`--default-malloc` leaves it as it is). With another
allocator in `LD_PRELOAD` what is allocated and not freed is not known, and counts as 0.
"""

import argparse
import ctypes
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
from scipy.stats import theilslopes

import tests.support.environment  # noqa: F401
from tests.support.mix import close, make_llm
from tests.torture.episode import Episode, draw
from tests.torture.rig import Rig, compare
from tests.torture.run import MODES, POLICIES, Tally, options_of, references
from vllm_agentserve.doctor import ALLOCATORS
from vllm_agentserve.toy import make_toy_model

SETTLED_AFTER = 1 / 6
"""Share of the time in which memory may still grow: caches and allocators fill."""
COLUMNS = ("hours", "engine_mib", "lane_mib", "live_mib", "open_files")
Row = tuple[float, float, float, float, int]


class MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def live_mib() -> float:
    """What this process has allocated and not freed, as glibc counts its heap and what it mapped; 0 with another allocator."""
    if any(name in os.environ.get("LD_PRELOAD", "") for name in ALLOCATORS):
        return 0.0
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = MallocInfo
    info = libc.mallinfo2()
    return (info.uordblks + info.hblkhd) / 2**20


def give_memory_back() -> None:
    """Parts of a megabyte and more are mapped and unmapped, and the end of the heap is given back, from now on."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc = ctypes.CDLL("libc.so.6")
    for option in (m_trim_threshold, m_mmap_threshold):
        if not libc.mallopt(option, 1 << 20):
            raise RuntimeError("glibc does not take mallopt: use --default-malloc")


def look(began: float) -> Row:
    """`COLUMNS`: resident memory of this process, in which the engine runs, and of its children; and its descriptors."""
    me = psutil.Process()
    lane = sum(child.memory_info().rss for child in me.children(recursive=True))
    hours = (time.monotonic() - began) / 3600
    own = round(me.memory_info().rss / 2**20, 1)
    return round(hours, 4), own, round(lane / 2**20, 1), round(live_mib(), 1), me.num_fds()


def slopes(rows: list[Row]) -> dict[str, list[float]]:
    """Per column: median slope per hour (Theil and Sen) and its 95 % interval, after memory has settled."""
    table = np.array(rows)
    table = table[table[:, 0] >= table[-1, 0] * SETTLED_AFTER]
    found = {}
    for number, name in enumerate(COLUMNS[1:], 1):
        slope, _, low, high = theilslopes(table[:, number], table[:, 0])
        found[name] = [round(float(value), 3) for value in (slope, low, high)]
    return found


def draw_picture(figures: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = np.array(figures["rows"])
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    for number, label in ((1, "engine, resident"), (3, "engine, allocated"), (2, "lane, resident")):
        slope, low, high = figures["slope_per_hour"][COLUMNS[number]]
        text = f"{label}: {slope:+.1f} MiB/h [{low:+.1f}, {high:+.1f}]"
        axes.plot(table[:, 0] * 60, table[:, number], linewidth=1, label=text)
    axes.axvspan(0, table[-1, 0] * 60 * SETTLED_AFTER, color="0.93", label="not in the slope")
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, table[:, 1:4].max() * 1.3))
    axes.set_title(f"{figures['requests']} requests, mode {figures['mode']}, policy {figures['policy']}")
    axes.legend(loc="upper left", ncols=2)
    figure.savefig(path, dpi=120)


def renamed(episode: Episode, cycle: int) -> Episode:
    """The same episode of other sessions."""
    requests = (replace(one, session=f"{one.session}-{cycle}") if one.session else one for one in episode.requests)
    return replace(episode, requests=tuple(requests))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--episodes", type=int, default=24, help="drawn at the start, then run in turn (default: 24)")
    parser.add_argument("--mode", choices=(*MODES, "none"), default="lanes")
    parser.add_argument("--policy", choices=list(POLICIES), default="plas")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--default-malloc", action="store_true", help="leave glibc's settings alone")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    if not arguments.default_malloc:
        give_memory_back()
    plain = arguments.mode == "none"
    options = options_of("lanes" if plain else arguments.mode, arguments.policy)
    episodes = [draw(arguments.seed + number, options) for number in range(arguments.episodes)]
    stock = references(episodes)
    llm = make_llm(make_toy_model(), None if plain else options)
    rig, tally, began, rows, cycle = Rig(llm), Tally(), time.monotonic(), [], 0
    while time.monotonic() - began < arguments.minutes * 60:
        for episode in episodes:
            outcome = rig.run(renamed(episode, cycle))
            wrong, ties = compare(episode, stock[episode.seed], outcome)
            tally.add(f"cycle {cycle} seed {episode.seed}", outcome, wrong, ties)
            rows.append(look(began))
            if time.monotonic() - began >= arguments.minutes * 60:
                break
        cycle += 1
    close(llm)
    figures = {
        "command": " ".join(["python", "-m", "tests.torture.soak", *sys.argv[1:]]),
        "allocator": {name: os.environ[name] for name in ("LD_PRELOAD", "MALLOC_ARENA_MAX") if name in os.environ},
        "date": time.strftime("%Y-%m-%d"),
        "hours": rows[-1][0],
        "mode": arguments.mode,
        "policy": arguments.policy,
        **vars(tally),
        "slope_per_hour": slopes(rows),
        "first": rows[0],
        "last": rows[-1],
    }
    print(json.dumps(figures, indent=1))
    figures |= {"columns": COLUMNS, "rows": rows}
    arguments.output.write_text(json.dumps(figures) + "\n")
    if arguments.picture:
        draw_picture(figures, arguments.picture)
    return bool(tally.mismatches)


if __name__ == "__main__":
    sys.exit(main())
