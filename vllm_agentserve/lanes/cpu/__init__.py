"""The CPU provider: the lane is a process of its own, with a second copy of the weights, over the worker's KV cache."""
