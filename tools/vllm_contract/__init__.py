"""The contract with vLLM: every part of it that this package uses, and whether a tree of its sources still has them.

Imports neither vLLM nor torch. `tools/compat.py` is the command.
"""
