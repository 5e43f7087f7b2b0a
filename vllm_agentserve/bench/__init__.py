"""Agent workloads against real vLLM servers, stock and ours, and what the streams saw."""
