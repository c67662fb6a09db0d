"""How much time each function used itself, and how much with all that it called."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Function(NamedTuple):
    """What tells one function from another, wherever in it a sample was taken."""

    name: str
    module: str
    kernel: bool
    unnamed: bool


@dataclass(slots=True)
class Use:
    """The samples of one function: `own` where it ran itself, `total` where it is on the stack,
    counted once a sample however often it is there; `guessed` of these where its frame was a
    guess."""

    function: Function
    own: int = 0
    total: int = 0
    guessed: int = 0


class Uses:
    """Every function that was met, added up as samples come. The sum of `own` is the number of
    samples."""

    def __init__(self) -> None:
        self._found: dict[Function, Use] = {}

    def add(self, stack: Iterable[Function], leaf: Function, count: int) -> None:
        """COUNT samples of a stack that ends with LEAF."""
        for function in set(stack):
            self._use(function).total += count
        self._use(leaf).own += count

    def add_guessed(self, functions: Iterable[Function], count: int) -> None:
        """COUNT samples, added before, in which FUNCTIONS were guesses."""
        for function in set(functions):
            self._use(function).guessed += count

    def ordered(self) -> list[Use]:
        """Those that used most themselves come first."""
        return sorted(self._found.values(), key=lambda it: (-it.own, -it.total, it.function))

    def _use(self, function: Function) -> Use:
        use = self._found.get(function)
        if use is None:
            use = self._found[function] = Use(function)
        return use
