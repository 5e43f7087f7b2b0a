"""Code in an interpreter of its own, where nothing has been imported yet."""

import subprocess
import sys

from tests.support.paths import ROOT


def run_code(code: str) -> "subprocess.CompletedProcess[str]":
    """Runs it in the checkout; returns exit status, output and errors."""
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False, cwd=ROOT)
