"""What a colony does not do because another one does it, across a bus: its questions are answered
with where to ask."""

from __future__ import annotations

from typing import Final, NoReturn

from coral.colony.delivery import Away
from coral.colony.store.errors import StoreError

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

    async def snapshot(self, *_: object, **_more: object) -> NoReturn:
        """Raises `StoreError`."""
        raise StoreError(STORES_NOTHING)


class FollowsNobody:
    """In place of a fleet."""

    async def collect(self, *_: object, **_more: object) -> NoReturn:
        """Raises `StoreError`."""
        raise StoreError(FOLLOWS_NOBODY)

    def away(self) -> tuple[Away, ...]:
        """None."""
        return ()

    async def stop(self, *_: object) -> NoReturn:
        """Raises `StoreError`."""
        raise StoreError(FOLLOWS_NOBODY)
