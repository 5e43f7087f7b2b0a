"""Runs a command with the Python sources of another vLLM in front of the installed CPU build.

    python tools/with_vllm_sources.py 0.33.0 python -m pytest tests/steps

The sources are those of that version's wheel, fetched once (340 MB, see `compat.py`). Compiled kernels stay those of the
installed build, so this shows what vLLM's Python code does with our classes, and nothing about kernels.

Exit code: that of the command, or 2 when the version cannot be fetched or no CPU build of vLLM is installed.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compat import FetchError, fetched_sources, installed_sources

CPU = "+cpu"


def make_overlay(version: str, sources: Path, installed: Path, folder: Path) -> None:
    """Fills a folder for `PYTHONPATH`: a `vllm` package of links, and the metadata that gives it its version.

    Args:
        sources: the folder that holds the Python sources of that version.
        installed: the folder that holds the installed vLLM, whose compiled parts are linked.
        folder: an empty one.
    """
    package = folder / "vllm"
    package.mkdir()
    for one in (sources / "vllm").iterdir():
        if one.name != "__pycache__":
            (package / one.name).symlink_to(one)
    for one in (installed / "vllm").glob("*.so"):
        (package / one.name).symlink_to(one)
    # vLLM takes its platform from this name.
    info = folder / f"vllm-{version}{CPU}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}{CPU}\n")


def environment_of(overlay: Path) -> dict[str, str]:
    """The environment of a process that imports vLLM from the overlay, and this package from wherever it does now."""
    path = [str(overlay), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    version, *command = arguments
    try:
        sources, installed = fetched_sources(version), installed_sources()
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not list(installed.glob(f"vllm-*{CPU}.dist-info")):
        print(
            "error: the installed vLLM is no CPU build, so its compiled parts do not fit: see tools/bootstrap.py --cpu",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="agentserve-vllm-") as folder:
        make_overlay(version, sources, installed, Path(folder))
        return subprocess.run(command, env=environment_of(Path(folder)), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
