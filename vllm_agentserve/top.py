"""`agentserve top`: the programs of a running server, live, from its public `/metrics` alone."""

import argparse
import sys
import time
from typing import NoReturn

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from vllm_agentserve.pages import given_key, has_password
from vllm_agentserve.top_scrape import EngineMetrics, ScrapeError, page_of, scrape
from vllm_agentserve.top_table import picture

INTERRUPTED = 130
PLAIN_WIDTH = 120
"""Columns if the output is not a terminal."""


def execute(arguments: argparse.Namespace) -> int:
    """Shows the table until Ctrl-C, or once with `--once` or if the output is not a terminal.

    Returns the exit code: 0; 1 if it is to be shown once and the server does not answer; 2 if the address or the key cannot be
    one; 130 if that was interrupted.
    """
    console = Console()
    try:
        key = given_key(arguments.api_key)
        if has_password(arguments.url):
            raise ValueError("--url holds a user name or a password, which would be shown: give a key with --api-key")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page = page_of(arguments.url)
    if arguments.once or not console.is_terminal:
        if not console.is_terminal:
            console = Console(width=PLAIN_WIDTH)
        try:
            return show_once(page, arguments.interval, arguments.session, console, key)
        except KeyboardInterrupt:
            return INTERRUPTED
    try:
        watch(page, arguments.interval, arguments.session, console, key)
    except KeyboardInterrupt:
        return 0


def show_once(page: str, interval_s: float, session: str | None, console: Console, key: str | None = None) -> int:
    """Scrapes twice, `interval_s` apart, and prints the table; returns the exit code."""
    try:
        before = scrape(page, key)
        time.sleep(interval_s)
        console.print(picture(scrape(page, key), before, session))
    except ScrapeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def watch(page: str, interval_s: float, session: str | None, console: Console, key: str | None = None) -> NoReturn:
    """Shows the table, refreshed every `interval_s`. Shows errors and keeps trying. Never returns."""
    before: dict[str, EngineMetrics] | None = None
    shown: RenderableType = Text()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                now = scrape(page, key)
            except ScrapeError as error:
                message = f"error: {error}\ntrying again every {interval_s:g} s; Ctrl-C ends."
                live.update(Group(Text(message, style="red"), Text(), shown), refresh=True)
            else:
                before, shown = now, picture(now, before, session)
                live.update(shown, refresh=True)
            time.sleep(interval_s)
