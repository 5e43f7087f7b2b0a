"""The one kernel of the probe; imported only where Triton and a GPU are."""

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from triton.language.extra.cuda import globaltimer, smid  # type: ignore[import-untyped]


@triton.jit
def stay(seen, nanoseconds):  # type: ignore[no-untyped-def]
    """Stays on its multiprocessor for so many nanoseconds, then writes which one that is: `seen[program] = smid`, int32.

    Without staying, a few multiprocessors could run all programs of the grid one after the other.
    """
    began = globaltimer()
    now = began
    while now - began < nanoseconds:
        now = globaltimer()
    tl.store(seen + tl.program_id(0), smid())
