"""The prefill lane: long prompts are computed beside the decode steps, over the same KV cache.

Two providers make lanes: `cpu/`, and `cuda/`, which is experimental.
"""
