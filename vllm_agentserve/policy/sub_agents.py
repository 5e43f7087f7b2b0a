"""Which programs seem to be sub-agents of others, where their clients do not say so.

A parent starts a sub-agent right after one of its calls, is silent until the sub-agent has ended, and comes back soon. A program
that began for other reasons just then looks the same at first, but the other one comes back while it is still at work, or long
after, or never. So who might have started a program is remembered, and whether that was true is learned: nothing is thought of
new programs until most of those before turned out to be sub-agents. How fast this adapts: three in a row are enough at first,
and about 32 are remembered (`policy/gaps.py`).
"""

from collections import OrderedDict, deque

from vllm_agentserve.policy.claims import Program
from vllm_agentserve.policy.gaps import Share

SOON_S = 0.1
"""A program that comes so soon after the last call of another may be its sub-agent."""
CANDIDATES = 4
"""Of the programs whose calls ended last, so many may have started it."""
SEEMS, PRIOR = 0.5, 2.0
"""New programs are thought to be sub-agents where more than this share was, with so many that were not to begin with."""
SINGLE, SEVERAL = 0.2, 0.5
"""A program of one call, or of several, counts as a sub-agent only if its parent went on being silent for no longer than this
share of its whole silence: by chance too programs end within a gap of another one. A parent may wait for several at once."""
PROGRAMS_KEPT = 256
"""Programs of which it is not known yet, and as many that may still turn out to be none."""


class SubAgents:
    """Told of programs that come, of their calls that end, and of programs that come back or go."""

    def __init__(self) -> None:
        self._true = Share()
        self._ended: deque[tuple[Program, float]] = deque(maxlen=CANDIDATES)
        """Programs whose calls ended last, and when."""
        self._parents: OrderedDict[str, set[str]] = OrderedDict()
        """Who may have started a program: those that have been silent since."""
        self._children: dict[str, dict[str, Program]] = {}
        """The same the other way round."""
        self._gone: set[str] = set()
        """Those of both that are thought to be over."""
        self._believed: OrderedDict[str, None] = OrderedDict()
        """Programs that seemed to be over when their parents came back."""

    @property
    def learned(self) -> bool:
        """Whether it was seen of any program whether it was a sub-agent."""
        return self._true.samples > 0

    def seems(self, program: Program) -> bool:
        """Whether a program that has not begun is a sub-agent, more likely than not, of one that waits for it."""
        return program.name in self._parents and self._true.estimate(0.0, PRIOR) > SEEMS

    def comes(self, program: Program, now_s: float) -> None:
        """The first call of a program came."""
        self.forget(program.name)
        parents = {
            one.name for one, ended_s in self._ended if now_s - ended_s <= SOON_S and not (one.calls or one.over)
        } - {program.name}
        if not parents:
            return
        self._parents[program.name] = parents
        for name in parents:
            self._children.setdefault(name, {})[program.name] = program
        if len(self._parents) > PROGRAMS_KEPT:
            self.forget(next(iter(self._parents)))
            self._true.add(False)

    def ended(self, program: Program, now_s: float) -> None:
        """A call of a program ended, and it has no other."""
        self._ended.append((program, now_s))

    def comes_back(self, program: Program, now_s: float) -> None:
        """A program that was away has come back."""
        self._gone.discard(program.name)
        if program.name in self._believed:
            # It was not over: a yes too many, so two noes.
            del self._believed[program.name]
            self._true.add(False)
            self._true.add(False)
        for name, child in self._children.pop(program.name, {}).items():
            if child.calls:
                self._not_of(name, program.name)
                continue
            self.forget(name)
            if child.turns:
                after, silent = now_s - child.ended_s, now_s - program.ended_s
                true = after <= (SEVERAL if child.turns > 1 else SINGLE) * silent
                self._true.add(true)
                if true:
                    self._believed[name] = None
                    if len(self._believed) > PROGRAMS_KEPT:
                        self._believed.popitem(last=False)

    def gone(self, program: Program) -> None:
        """A program is thought to be over."""
        name = program.name
        self._believed.pop(name, None)
        if name in self._children or name in self._parents:
            self._gone.add(name)
        for child in [name, *self._children.get(name, ())]:
            if child in self._gone and child in self._parents and self._parents[child] <= self._gone:
                self.forget(child)
                self._true.add(False)

    def _not_of(self, child: str, parent: str) -> None:
        """A program was not started by that one."""
        self._parents[child].discard(parent)
        if not self._parents[child]:
            self.forget(child)
            self._true.add(False)

    def forget(self, child: str) -> None:
        """Nobody needs to know any more who may have started a program."""
        for parent in self._parents.pop(child, ()):
            children = self._children.get(parent)
            if children is not None:
                del children[child]
                if not children:
                    del self._children[parent]
                    if parent not in self._parents:
                        self._gone.discard(parent)
        if child not in self._children:
            self._gone.discard(child)
