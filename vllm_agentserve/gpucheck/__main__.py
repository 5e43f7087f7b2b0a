"""python -m vllm_agentserve.gpucheck --output DIR"""

from vllm_agentserve.gpucheck.command import main

if __name__ == "__main__":
    raise SystemExit(main())
