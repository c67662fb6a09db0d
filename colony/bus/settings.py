"""Where the bus is, and what it may use. Figures and names alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_DAY_S: Final = 86400.0
_MIB: Final = 1 << 20
_GIB: Final = 1 << 30

SECRETS: Final = ("user", "token_file", "nkey_file", "credentials_file")
"""Those of the settings that say who a client of the servers is; one of them at most."""


@dataclass(frozen=True, slots=True)
class BusSettings:
    """`servers` are URLs: `nats://HOST:PORT`, `tls://HOST:PORT`.

    The stream is made where it is not there, with `max_age_s`, `max_bytes` and `replicas`; one that
    is there stays as its operators made it.
    """

    servers: tuple[str, ...]
    stream: str = "CORAL"
    prefix: str = "coral"
    """What its subjects begin with."""
    max_age_s: float = _DAY_S
    max_bytes: int = 64 * _GIB
    replicas: int = 1
    user: str = ""
    password_file: str = ""
    token_file: str = ""
    nkey_file: str = ""
    credentials_file: str = ""
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""

    reader: str = "colony"
    """The name under which a colony that stores reads. Colonies with one name share the agents by
    `shard`, of `shards`; those of another name get everything once more."""
    shard: int = 0
    shards: int = 1

    queue_bytes: int = 32 * _MIB
    """Beyond this, `Publisher.room` waits."""
    in_flight: int = 256
    """So many messages wait for the server's word at a time."""
    timeout_s: float = 5.0
    most_retry_s: float = 5.0
    """After a failure, the pause before the next try; it doubles up to this."""
    fetch: int = 64
    """So many messages are read at a time."""
    ack_wait_s: float = 300.0
    """What was read and not stored for so long is sent again, and left out."""

    @property
    def consumer(self) -> str:
        """The name of the durable consumer in the stream."""
        return self.reader if self.shards == 1 else f"{self.reader}-{self.shard}-of-{self.shards}"
