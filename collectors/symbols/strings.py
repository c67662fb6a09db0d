"""Texts by number: each is kept once, and arrays hold the numbers."""

from __future__ import annotations

from typing import Final

from coral.wire.text import safe

LONGEST: Final = 512
"""Letters of a name; of a longer one, the first of them and an ellipsis."""
_OVERHEAD_BYTES: Final = 150  # of a str in a dict and a list


class Strings:
    """Texts, each with a number from 0 on; number 0 is the empty text. What a terminal would act on
    is replaced by `?`, and long ones are cut."""

    def __init__(self) -> None:
        self._texts = [""]
        self._numbers = {"": 0}
        self.memory_bytes = 0

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, number: int) -> str:
        return self._texts[number]

    def number(self, text: str) -> int:
        """The number of TEXT, which is added if it is new."""
        found = self._numbers.get(text)
        if found is not None:
            return found
        clean = safe(text[: LONGEST + 1])
        if len(clean) > LONGEST:
            clean = clean[: LONGEST - 1] + "…"
        found = self._numbers.get(clean)
        if found is None:
            found = self._numbers[clean] = len(self._texts)
            self._texts.append(clean)
            self.memory_bytes += len(clean) + _OVERHEAD_BYTES
        return found
