"""What a colony does not do because another one does it, across a bus: its questions are answered
with where to ask."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, NoReturn, TypeVar

import duckdb

from coral.colony.answers.service import Outcome
from coral.colony.answers.sources import Sources
from coral.colony.delivery import Away
from coral.colony.store.errors import StoreError

T = TypeVar("T")

STORES_NOTHING: Final = (
    "this colony publishes what it follows (bus.mode is publish) and stores nothing: ask one with "
    "bus.mode store"
)
FOLLOWS_NOBODY: Final = (
    "this colony stores what others publish (bus.mode is store) and follows no agents: collect by "
    "one with bus.mode publish"
)


class StoresNothing:
    """In place of a store."""

    async def snapshot(
        self, work: Callable[[duckdb.DuckDBPyConnection, Sources], T], *, deadline_s: float
    ) -> T:
        """Raises `StoreError`."""
        raise StoreError(STORES_NOTHING)


class FollowsNobody:
    """In place of a fleet."""

    async def collect(
        self,
        kind: int | str,
        *,
        config: Mapping[str, str] | None = None,
        service: str = "",
        duration_s: float | None = None,
        agents: Collection[str] = (),
    ) -> Sequence[Outcome]:
        """Raises `StoreError`."""
        _refuse()

    def away(self) -> Sequence[Away]:
        """None."""
        return ()

    async def stop(self, agent_id: str, collector_id: str) -> Outcome:
        """Raises `StoreError`."""
        _refuse()


def _refuse() -> NoReturn:
    raise StoreError(FOLLOWS_NOBODY)
