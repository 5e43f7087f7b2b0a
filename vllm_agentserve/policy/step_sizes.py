"""The sizes of steps: how many tokens a step with decodes and prompts has in all."""

EVERY_SIZE_TO = 64
"""Up to so many tokens a step may have any size: decodes alone, or short returning prompts beside them."""


def size_quantum(total: int, granularity: int) -> int:
    """What a step of about `total` tokens has a multiple of: eight sizes to an octave, and multiples of the granularity."""
    return max(granularity, 1 << max(total.bit_length() - 4, 0))


def step_sizes(largest: int, granularity: int) -> list[int]:
    """The sizes that steps have again and again, growing: every one up to `EVERY_SIZE_TO`, those of the grid to which steps are
    rounded, and the largest.

    The last chunk of a prompt is not rounded: above `EVERY_SIZE_TO` tokens the step that ends one may have any size.

    Args:
        largest: tokens of a step, at most.
        granularity: of the grid.
    """
    sizes = list(range(1, min(EVERY_SIZE_TO, largest) + 1))
    size = EVERY_SIZE_TO
    while size < largest:
        quantum = size_quantum(size, granularity)
        size = min(size - size % quantum + quantum, largest)
        sizes.append(size)
    return sizes
