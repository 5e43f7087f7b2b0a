"""Whether this package fits a version of vLLM, read from its sources: the contract holds, and our patches apply.

    python tools/compat.py                    # the installed vLLM
    python tools/compat.py --version 0.33.0   # another one: its wheel is fetched once, never installed

Exit code: 0 when all fits, 1 when something moved, 2 when the version cannot be fetched or is none.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_contract.check import Status, SymbolResult, check_symbols  # noqa: E402
from vllm_contract.contract import CONTRACT  # noqa: E402
from vllm_contract.sources import Sources  # noqa: E402

from vllm_agentserve.vllm_compat import installed_vllm  # noqa: E402

PATCHES = ROOT / "patches"
PLATFORM = "manylinux_2_28_x86_64"


class FetchError(RuntimeError):
    """A version of vLLM cannot be had here; the message says why and what to do."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_agentserve"


def fetched_sources(version: str, cache: Path | None = None) -> Path:
    """The folder with the `.py` files of that version's wheel; fetches it, about 340 MB, where it is not there yet.

    Raises:
        FetchError: it is no version, or pip cannot get its wheel.
    """
    if not re.fullmatch(r"\d+\.\d+(\.\d+)?[a-z0-9.+]*", version):
        raise FetchError(f"{version!r} is no version of vLLM: give one such as 0.33.0")
    cache = cache or cache_folder()
    folder = cache / f"vllm-{version}-sources"
    if any((folder / "vllm").glob("*.py")):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as place:
        wheel = downloaded(version, Path(place))
        unpacked = Path(place) / "sources"
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked, [name for name in archive.namelist() if name.endswith(".py")])
        except (OSError, zipfile.BadZipFile) as error:
            raise FetchError(f"the wheel of vLLM {version} cannot be unpacked into {cache}: {error}") from error
        if folder.is_dir() and not any((folder / "vllm").glob("*.py")):
            shutil.rmtree(folder)  # left by a run that was cut short
        # At once, so that an interrupted run leaves nothing that looks complete.
        try:
            unpacked.rename(folder)
        except OSError as error:
            if not any((folder / "vllm").glob("*.py")):  # another run was no faster
                raise FetchError(f"the sources of vLLM {version} cannot be moved to {folder}: {error}") from error
    return folder


def downloaded(version: str, place: Path) -> Path:
    """The wheel of that version without what it depends on. Raises `FetchError`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps", "-d", str(place)]
    command = [*pip, "--only-binary", ":all:", "--platform", PLATFORM, f"vllm=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(place.glob("vllm-*.whl"), None)
    if done.returncode != 0 or wheel is None:
        words = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise FetchError(
            f"vLLM {version} cannot be fetched: is there such a version, and an index that pip reaches? It says: "
            f"{' '.join(words)[-300:] or 'nothing'}"
        )
    return wheel


def installed_sources() -> Path:
    """The folder that holds the installed vLLM. Raises `FetchError` when there is none."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise FetchError("vLLM is not installed: name a version, for example `make compat VLLM=0.33.0`")
    return Path(spec.origin).parent.parent


def refused_patches(version: str, sources: Path, patches: Path = PATCHES) -> list[str]:
    """Which patches for that minor version do not apply to the sources, and why; a line each."""
    minor = ".".join(version.split(".")[:2])
    found = sorted((patches / minor).glob("*.patch"))
    if not found:
        return [f"patches/{minor}: there are no patches for this minor version"]
    refused = []
    with tempfile.TemporaryDirectory(prefix="agentserve-patches-") as place:
        # git looks for a repository around the files, so they are copied to where there is none.
        for patch in found:
            touched = re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.MULTILINE)
            for name in touched:
                if (sources / name).is_file():
                    (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(sources / name, Path(place) / name)
            command = ["git", "apply", "--check", str(patch)]
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                refused.append(f"patches/{minor}/{patch.name}: {' '.join(done.stderr.split())}")
    missing = {one.name for one in patches.glob("*/*.patch")} - {one.name for one in found}
    return refused + [
        f"patches/{minor}/{name}: there is one for another minor version only" for name in sorted(missing)
    ]


def compare(version: str, sources: Path) -> tuple[list[SymbolResult], list[str]]:
    """What of the contract moved in these sources, and which patches are refused."""
    findings = check_symbols(Sources(sources), CONTRACT)
    return [one for one in findings if one.status is not Status.PRESENT], refused_patches(version, sources)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", help="of vLLM (default: the installed one)")
    version = parser.parse_args(argv).version
    try:
        sources = fetched_sources(version) if version else installed_sources()
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    version = version or str(installed_vllm())
    moved, refused = compare(version, sources)
    for line in [*map(str, moved), *refused]:
        print(line)
    print(
        f"vLLM {version}: {len(CONTRACT) - len(moved)} of {len(CONTRACT)} symbols are where they were, "
        f"{len(refused)} problem(s) with patches"
    )
    return 1 if moved or refused else 0


if __name__ == "__main__":
    sys.exit(main())
