"""Runs a command that ends when its parent does: `python child.py PARENT COMMAND ...`."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    parent, command = int(argv[0]), argv[1:]
    # The signal comes when the thread that made this process ends; it stays set when another program takes its place.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent has ended already")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
