"""A table of what clients send and measure, written when all have run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One client.

    Args:
        client: its name and version.
        session: what it says of its session.
        programs: what the server makes of that.
        result: what it did, or how its figures compare with ours.
    """

    client: str
    session: str
    programs: str
    result: str


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| client | session | programs | result |", "|---|---|---|---|"]
    return (
        "\n".join([*lines, *(f"| {row.client} | {row.session} | {row.programs} | {row.result} |" for row in rows)])
        + "\n"
    )
