"""What the followers count, for the colony's own metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counts:
    """Since the colony began. `deliveries`, `rows` and `bytes` are by kind, `lost` by kind and
    stage; `refused` are starts and renewals that agents refused, by kind."""

    deliveries: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    lost: Counter[tuple[str, str]] = field(default_factory=Counter)
    started: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    sessions_lost: int = 0
    connections: int = 0
    failures: int = 0
    """Connections that could not be made, or broke."""
