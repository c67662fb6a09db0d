"""The keys `storage.…` of the colony's configuration."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from coral.colony.config_units import ByteCount, Duration
from coral.colony.store.settings import Settings, Tier

_DEFAULTS: Final = Settings()


class Storage(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is kept, and for how long."""

    raw: Annotated[Duration, Meta(description="how long rows are kept as they came")] = Duration(
        _DEFAULTS.keep_s[Tier.RAW]
    )
    minutes: Annotated[Duration, Meta(description="how long sums of a minute are kept")] = Duration(
        _DEFAULTS.keep_s[Tier.MINUTE]
    )
    hours: Annotated[Duration, Meta(description="how long sums of an hour are kept")] = Duration(
        _DEFAULTS.keep_s[Tier.HOUR]
    )
    most_bytes: Annotated[
        ByteCount,
        Meta(
            description="the most that the directory may have; beyond it the oldest rows go first, "
            "and before sums those that are not summed up"
        ),
    ] = ByteCount(_DEFAULTS.most_bytes)
    memory: Annotated[ByteCount, Meta(description="what the database may take of memory")] = (
        ByteCount(_DEFAULTS.memory_bytes)
    )
    queue: Annotated[
        ByteCount,
        Meta(
            description="how much may wait to be stored, before agents are read no further and "
            "keep it themselves"
        ),
    ] = ByteCount(_DEFAULTS.queue_bytes)

    def as_settings(self) -> Settings:
        """For the store."""
        return Settings(
            keep_s={Tier.RAW: self.raw, Tier.MINUTE: self.minutes, Tier.HOUR: self.hours},
            most_bytes=self.most_bytes,
            memory_bytes=self.memory,
            queue_bytes=self.queue,
        )
