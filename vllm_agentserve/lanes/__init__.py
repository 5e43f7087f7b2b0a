"""The prefill lane: long prompts are computed beside the decode steps, over the same KV cache."""
