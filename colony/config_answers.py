"""The keys of the colony's configuration that say who may ask, and what questions may cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from coral.colony.answers.access import Role, TokenFile
from coral.colony.answers.settings import ServingTls
from coral.colony.answers.sql.pool import Limits
from coral.colony.config_units import ByteCount, Duration

_LIMITS: Final = Limits()


class Tls(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The encryption of questions over TCP."""

    certificate: Annotated[
        str, Meta(description="a PEM file with the certificate that `listen` shows on TCP")
    ] = ""
    key: Annotated[str, Meta(description="a PEM file with its key")] = ""
    client_ca: Annotated[
        str,
        Meta(
            description="a PEM file with authorities, one of which must have signed the "
            "certificate of each client; empty: clients need none"
        ),
    ] = ""

    def as_serving(self) -> ServingTls | None:
        """For the server; None where there is no TLS."""
        if not self.certificate:
            return None
        authorities = Path(self.client_ca) if self.client_ca else None
        return ServingTls(Path(self.certificate), Path(self.key), authorities)


class Token(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A token that lets its holders ask over TCP."""

    name: Annotated[str, Meta(description="what the log calls its holders")]
    file: Annotated[
        str, Meta(description="a file with the token, which is read again when it changes")
    ]
    role: Annotated[
        Literal["view", "operate"],
        Meta(description="`view`: ask; `operate`: start and stop collectors, too"),
    ] = "view"

    def as_file(self) -> TokenFile:
        """For the server."""
        return TokenFile(self.name, Path(self.file), Role[self.role.upper()])


class Sql(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a statement in SQL may use; each has a process of its own."""

    deadline: Annotated[Duration, Meta(description="how long a statement may take")] = Duration(
        _LIMITS.deadline_s
    )
    memory: Annotated[ByteCount, Meta(description="how much memory it may take")] = ByteCount(
        _LIMITS.memory_bytes
    )
    most_rows: Annotated[
        int, Meta(ge=1, le=1_000_000_000, description="how many rows its answer may have")
    ] = _LIMITS.most_rows
    at_a_time: Annotated[
        int, Meta(ge=1, le=64, description="how many statements are answered at a time")
    ] = _LIMITS.at_a_time

    def as_limits(self) -> Limits:
        """For the server."""
        return Limits(self.deadline, self.memory, self.most_rows, self.at_a_time)


def problem(tls: Tls) -> str:
    """What is not accepted of these keys, or nothing."""
    if bool(tls.certificate) != bool(tls.key):
        lacking = "key" if tls.certificate else "certificate"
        return f"tls.{lacking}: give it too: a certificate and its key belong together"
    if tls.client_ca and not tls.certificate:
        return "tls.certificate: clients can show theirs only where there is TLS"
    return ""
