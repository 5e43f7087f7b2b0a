"""Tables in Markdown with a column for each arm, under headings."""

from collections.abc import Iterable, Sequence

Row = tuple[str, str, Sequence[str]]
"""Heading of the table, name of the row, and a field for each arm."""


def arm_tables(arms: Iterable[str], rows: Sequence[Row], heading: str = "###") -> str:
    """One table for each heading, in the order in which headings come first.

    Args:
        heading: what stands before each.
    """
    names = list(arms)
    lines: list[str] = []
    for title in dict.fromkeys(row[0] for row in rows):
        lines += ["", f"{heading} {title}", "", "| live context, gap | " + " | ".join(names) + " |"]
        lines.append("|---" * (len(names) + 1) + "|")
        lines += [f"| {name} | " + " | ".join(fields) + " |" for of, name, fields in rows if of == title]
    return "\n".join(lines).strip() + "\n"


def found_and_sessions(figures: dict[str, float]) -> str:
    """A field: share of context that was found, and the mean and p95 of sessions in s."""
    return f"{figures['hit_ratio']:.2f} / {figures['session_mean_s']:.1f} / {figures['session_p95_s']:.1f}"
