"""Pure decisions: state in, decision out. Nothing here imports vLLM or torch."""
