"""The environment that vLLM needs on a machine without hub and GPU: importing this module sets it."""

import os

from vllm_agentserve.bench.server import serving_environment

for name, value in serving_environment().items():
    os.environ.setdefault(name, value)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
