"""One page of metrics for several engines."""

import re
from collections.abc import Mapping
from typing import Any

from vllm_agentserve.cluster.timings import samples

SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?( .*)$")
SERIES = "agentserve_cluster_"
"""What the series of placement begin with."""
LABEL = "replica"
"""Names the engine. vLLM has a label `engine` of its own."""
KINDS = {
    "decisions_total": ("counter", "Calls placed, by the reason of their place."),
    "moves_total": ("counter", "Conversations that went on at another engine."),
    "prefills_total": ("counter", "Prompts that a prefiller was asked for, by what came of it."),
    "decision_seconds": ("histogram", "Seconds that the choice of an engine took, by whether the table was asked."),
    "pins": ("gauge", "Conversations that are pinned."),
    "engine_pins": ("gauge", "Conversations that are pinned to an engine."),
    "engine_moves_total": ("counter", "Conversations that came to an engine from another one."),
    "engine_resident_tokens": ("gauge", "Tokens of the conversations that are pinned to an engine."),
}
PER_ENGINE = {
    "engine_pins": "engine_pins",
    "engine_moves_total": "engine_moves",
    "engine_resident_tokens": "resident_tokens",
}
"""Series with a value for each engine, and what `PinTable.shown` calls them."""


def merged(shown: Mapping[str, Any], pages: Mapping[str, str]) -> str:
    """The page of a cluster: what the table of pins shows, and each engine's page with the label `replica`.

    Args:
        shown: see `PinTable.shown`.
        pages: by the name of the engine.
    """
    families: dict[str, list[str]] = {}
    for name, (kind, text) in KINDS.items():
        families[SERIES + name] = [f"# HELP {SERIES}{name} {text}", f"# TYPE {SERIES}{name} {kind}"]
    for reason, count in sorted(shown["decisions"].items()):
        families[f"{SERIES}decisions_total"].append(f'{SERIES}decisions_total{{reason="{reason}"}} {count}')
    families[f"{SERIES}moves_total"].append(f"{SERIES}moves_total {shown['moves']}")
    for outcome, count in sorted(shown["prefills"].items()):
        families[f"{SERIES}prefills_total"].append(f'{SERIES}prefills_total{{outcome="{outcome}"}} {count}')
    for name, counts in sorted(shown["timings"].items()):
        families[f"{SERIES}decision_seconds"] += samples(f"{SERIES}decision_seconds", f'table="{name}"', counts)
    families[f"{SERIES}pins"].append(f"{SERIES}pins {shown['pins']}")
    for name, key in PER_ENGINE.items():
        for engine, value in sorted(shown[key].items()):
            families[SERIES + name].append(f'{SERIES}{name}{{{LABEL}="{engine}"}} {value}')
    for engine, page in sorted(pages.items()):
        add_page(families, engine, page)
    return "\n".join(line for lines in families.values() for line in lines) + "\n"


def add_page(families: dict[str, list[str]], engine: str, page: str) -> None:
    """All samples of a family have to stand together, so those of every engine join those of the ones before."""
    family: list[str] = []
    for line in page.splitlines():
        if line.startswith(("# HELP ", "# TYPE ")):
            name = line.split(" ", 3)[2]
            family = families.setdefault(name, [])
            if not any(known.startswith(line[:7]) for known in family[:2]):
                family.append(line)
        elif found := SAMPLE.match(line):
            name, labels, value = found.groups()
            family.append(f'{name}{{{LABEL}="{engine}"{"," + labels if labels else ""}}}{value}')
