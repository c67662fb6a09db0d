"""Where questions are answered, and whose. Plain data: the configuration makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coral.colony.answers.access import TokenFile
from coral.colony.answers.sql.pool import Limits


@dataclass(frozen=True, slots=True)
class ServingTls:
    """PEM files. With `client_ca`, every client must show a certificate that these have signed."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Serving:
    """`listen` has `unix:PATH` and `HOST:PORT`. TCP needs TLS beyond loopback, and tokens
    everywhere; `insecure_loopback` lets every local user ask, and start collectors."""

    listen: Sequence[str] = ("unix:/run/coral/colony.sock",)
    tls: ServingTls | None = None
    tokens: Sequence[TokenFile] = ()
    insecure_loopback: bool = False
    limits: Limits = field(default_factory=Limits)
