"""The CUDA provider: the lane is a second model runner in the worker, on streams of green contexts. Experimental.

The GPU check (`docs/gpu-check.md`) has run it on one NVIDIA H200; `docs/results/gpu.md` says what was seen.
No other GPU has run it, and no server has used it under load. Mode `auto` does not use it.
"""
