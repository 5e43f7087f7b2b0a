"""A machine with an NVIDIA GPU as `agentserve doctor` sees it: nvidia-smi and the driver are stubs."""

from pathlib import Path

import pytest

from tests.support.cuda_fakes import NewDriver
from vllm_agentserve import cli, doctor, doctor_gpu
from vllm_agentserve.vllm_compat import cuda

GPUS = {
    "H100": ("NVIDIA H100 80GB HBM3", 81559, 132, 9, "32+100, 64+68, 96+36", 224),
    "H200": ("NVIDIA H200", 143771, 132, 9, "32+100, 64+68, 96+36", 224),
    "RTX 5090": ("NVIDIA GeForce RTX 5090", 32607, 170, 12, "40+130, 88+82, 128+42", 224),
    "RTX 3090": ("NVIDIA GeForce RTX 3090", 24576, 82, 8, "20+62, 42+40, 62+20", 57),
    "RTX A5000": ("NVIDIA RTX A5000", 24564, 64, 8, "18+46, 32+32, 48+16", 57),
}
"""By card: its name, memory in MiB, SMs, compute capability, slots as decode + prefill, MiB of workspaces."""


class Machine:
    """A machine with one of these cards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, card: str, tells: bool) -> None:
        self.name, self.memory, units, major, self.slots, self.workspaces = GPUS[card]
        self.mig = "Disabled"
        self._smi = folder / "nvidia-smi"
        smallest, step = (4, 2) if major == 8 else (8, 8)
        self.driver = NewDriver(units, smallest=smallest, step=step, tells=tells, major=major)
        monkeypatch.setenv("PATH", str(folder))
        for module in (doctor_gpu, cuda):
            monkeypatch.setattr(module, "cuda_driver", lambda: self.driver)
        for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "PYTORCH_ALLOC_CONF"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(doctor_gpu, "MPS_FOLDER", str(folder / "no MPS"))
        # The processes that import torch and vLLM have nothing to do with the GPU.
        monkeypatch.setattr(doctor, "check_torch", lambda: [])
        monkeypatch.setattr(doctor, "check_scheduler", doctor.check_python)
        self.write()

    def write(self) -> None:
        line = f"{self.name}, 590.44.01, {self.memory}, {self.memory - 500}"
        script = f'#!/bin/sh\ncase "$1" in\n*mig.mode*) echo "{self.mig}";;\n*) echo "{line}";;\nesac\n'
        self._smi.write_text(script)
        self._smi.chmod(0o755)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["doctor", *arguments])
    return code, capsys.readouterr().out


LANES = ("--options", '{"mode": "lanes"}')
