"""The styles, scripts and markup that stand beside this module, for files that hold them whole."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

_FOLDER: Final = Path(__file__).parent


@cache
def asset(name: str) -> str:
    """The text of the file NAME."""
    return (_FOLDER / name).read_text(encoding="utf-8")
