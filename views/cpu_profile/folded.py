r"""Folded text: a line for each stack, `main;work;memcpy 17`, the outermost function first.

Frames of the kernel end with `_[k]`. Names are escaped, so that each stays one frame and one word:
a space is `␣`, and `;`, `\`, line breaks, controls and marks that turn the direction of writing
are escapes such as `\x3b`. The format has no place for what is lost or guessed.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Final

from coral.views.cpu_profile.names import escaped, visible
from coral.views.cpu_profile.profile import Frame, Profile
from coral.views.cpu_profile.tree import roots

_KERNEL: Final = "_[k]"
_MOST_NAMES: Final = 65_536
_SPACE: Final = "␣"


def folded(profile: Profile) -> str:
    """The stacks of PROFILE, in order. Stacks that differ only in addresses, or in the threads that
    have them, are one line."""
    lines: Counter[str] = Counter()
    marks_of = roots(profile)
    for origin, frames, count in profile.stacks():
        names = [*map(word, marks_of(origin)), *map(_frame_word, frames)]
        lines[";".join(names)] += count
    return "".join(f"{stack} {count}\n" for stack, count in sorted(lines.items()))


@lru_cache(_MOST_NAMES)
def _frame_word(frame: Frame) -> str:
    return word(frame.function) + (_KERNEL if frame.kernel else "")


@lru_cache(_MOST_NAMES)
def word(name: str) -> str:
    """NAME without anything that separates names or lines. Not reversible where a name has a `␣`
    of its own."""
    for char in "\\;":
        name = name.replace(char, escaped(char))
    name = visible(name.replace(" ", _SPACE))
    # Whatever else Unicode counts as a space: readers may split there.
    return "".join(escaped(char) if char.isspace() else char for char in name)
