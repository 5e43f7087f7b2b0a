"""Ctrl-C in tests that run in the background of a script."""

import signal


def heed_ctrl_c() -> None:
    """A process in the background of a script ignores Ctrl-C, and so does all that it starts, unless it calls this."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
