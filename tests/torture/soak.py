"""The soak: one engine for an hour under episodes of the torture rig, every answer compared, its memory looked at after each.

    python tests/torture/soak.py --minutes 60 --output docs/results/soak.json --picture docs/results/soak.png

A fixed number of episodes is drawn and run in turn; sessions have new names every time. Exit code 1 if an answer is not
stock's or books do not balance.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import conftest  # noqa: F401  the environment of the tests
import numpy as np
import psutil
from mix import close, make_llm
from scipy.stats import theilslopes

from torture.episode import Episode, draw
from torture.rig import Rig, compare
from torture.run import MODES, POLICIES, Tally, options_of, references
from vllm_agentserve.toy import make_toy_model

SETTLED_AFTER = 1 / 6
"""Share of the time in which memory may still grow: caches and allocators fill."""
COLUMNS = ("hours", "engine_mib", "lane_mib", "open_files")


def look(began: float) -> tuple[float, float, float, int]:
    """`COLUMNS`: resident memory of this process, in which the engine runs, and of its children; and its descriptors."""
    me = psutil.Process()
    lane = sum(child.memory_info().rss for child in me.children(recursive=True))
    hours = (time.monotonic() - began) / 3600
    return round(hours, 4), round(me.memory_info().rss / 2**20, 1), round(lane / 2**20, 1), me.num_fds()


def slopes(rows: list[tuple[float, float, float, int]]) -> dict[str, list[float]]:
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
    for number, label in ((1, "engine"), (2, "lane")):
        slope, low, high = figures["slope_per_hour"][COLUMNS[number]]
        text = f"{label}: {slope:+.1f} MiB/h [{low:+.1f}, {high:+.1f}]"
        axes.plot(table[:, 0] * 60, table[:, number], linewidth=1, label=text)
    axes.axvspan(0, table[-1, 0] * 60 * SETTLED_AFTER, color="0.93", label="not in the slope")
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, table[:, 1:3].max() * 1.25))
    axes.set_title(f"{figures['requests']} requests, mode {figures['mode']}, policy {figures['policy']}")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def renamed(episode: Episode, cycle: int) -> Episode:
    """The same episode of other sessions."""
    requests = (replace(one, session=f"{one.session}-{cycle}") if one.session else one for one in episode.requests)
    return replace(episode, requests=tuple(requests))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--episodes", type=int, default=24, help="drawn at the start, then run in turn (default: 24)")
    parser.add_argument("--mode", choices=MODES, default="lanes")
    parser.add_argument("--policy", choices=list(POLICIES), default="plas")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    options = options_of(arguments.mode, arguments.policy)
    episodes = [draw(arguments.seed + number, options) for number in range(arguments.episodes)]
    stock = references(episodes)
    llm = make_llm(make_toy_model(), options)
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
        "command": " ".join(["python", "tests/torture/soak.py", *sys.argv[1:]]),
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
