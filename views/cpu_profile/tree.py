"""The stacks of a profile as a tree of calls, which a flame graph draws.

Under the root there is a node for each process, if there are several, and under that a node `[cut]`
for the stacks whose callers are missing: their first frame is not where the program began. Callers
without names are told apart by where they call from; what they call last, only by its module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from coral.views.cpu_profile.functions import Function
from coral.views.cpu_profile.profile import CUT, Frame, Origin, Profile

ALL: Final = "all"
_NOBODY: Final = "(no name)"


@dataclass(slots=True)
class Node:
    """A function as called along one path. `total` samples passed through it, `own` ended in it,
    and in `guessed` of them its frame was a guess. `mark` tells a node that is no function."""

    function: Function
    mark: bool = False
    total: int = 0
    own: int = 0
    guessed: int = 0
    children: dict[Function, Node] = field(default_factory=dict)

    def child(self, function: Function, *, mark: bool = False) -> Node:
        """The node of FUNCTION below this one."""
        node = self.children.get(function)
        if node is None:
            node = self.children[function] = Node(function, mark)
        return node


def call_tree(profile: Profile) -> Node:
    """The tree of all samples."""
    root = Node(_marked(ALL), mark=True)
    marks_of = roots(profile)
    for origin, frames, count in profile.stacks():
        path = [root]
        for name in marks_of(origin):
            path.append(path[-1].child(_marked(name), mark=True))
        last = len(frames) - 1
        for at, frame in enumerate(frames):
            path.append(path[-1].child(frame.group if at == last else frame.key))
            path[-1].guessed += count * frame.guessed
        for node in path:
            node.total += count
        path[-1].own += count
    return root


def roots(profile: Profile) -> Callable[[Origin], Sequence[str]]:
    """What stands above the frames of a stack of PROFILE, by its origin: the process, if there are
    several, and `[cut]`."""
    several = len(profile.processes) > 1

    def marks(origin: Origin) -> Sequence[str]:
        process = [origin.process or _NOBODY] if several else []
        return [*process, *[CUT] * origin.cut]

    return marks


def walk(root: Node, least: float = 0.0) -> Iterator[tuple[int, int, Node]]:
    """Every node of at least LEAST samples with its depth, and the number of samples to the left of
    it: callers before what they call, and of those the one with most samples first."""
    waiting = [(0, 0, root)]
    while waiting:
        depth, left, node = waiting.pop()
        yield depth, left, node
        below = []
        # Those that are left out come last, so none is drawn to the right of them.
        drawn = (child for child in node.children.values() if child.total >= least)
        for child in sorted(drawn, key=lambda it: (-it.total, it.function)):
            below.append((depth + 1, left, child))
            left += child.total
        waiting.extend(reversed(below))


def least_drawn(root: Node, most: int) -> int:
    """How many samples a node must have, so that at most MOST nodes have as many; 1 where all fit.
    A node never has more samples than the one above it."""
    totals, waiting = [], [root]
    while waiting:
        node = waiting.pop()
        totals.append(node.total)
        waiting.extend(node.children.values())
    totals.sort(reverse=True)
    return totals[most] + 1 if len(totals) > most else 1


def _marked(name: str) -> Function:
    return Frame(name).key
