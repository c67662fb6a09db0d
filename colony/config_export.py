"""The keys `export.…` of the colony's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from msgspec import Meta, Struct, field

from coral.colony.config_units import Duration
from coral.colony.export.settings import ExportSettings, Receiver
from coral.wire.posting import headers_of
from coral.wire.settings.files import read_regular
from coral.wire.settings.words import shown

_DEFAULTS: Final = ExportSettings("")
_MOST_FILE_BYTES: Final = 1 << 20


class Target(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where metrics are sent."""

    endpoint: Annotated[str, Meta(description="the receiver's URL; empty: nothing is sent")] = ""
    headers_file: Annotated[
        str, Meta(description="a file with headers for the receiver, a `NAME: VALUE` a line")
    ] = ""
    ca_file: Annotated[
        str,
        Meta(description="the authorities of its certificate, in PEM; empty: this machine's"),
    ] = ""

    def as_receiver(self, key: str) -> Receiver | None:
        """For the exporter; None where nothing is sent. Raises ValueError, with KEY, for files that
        cannot be used."""
        if not self.endpoint:
            return None
        try:
            text = self._read("headers_file").decode(errors="replace")
            return Receiver(self.endpoint, headers_of(text), self._read("ca_file") or None)
        except ValueError as error:
            raise ValueError(f"{key}.{error}") from error

    def _read(self, name: str) -> bytes:
        path: str = getattr(self, name)
        try:
            return read_regular(Path(path), _MOST_FILE_BYTES) if path else b""
        except OSError as error:
            raise ValueError(f"{name}: {path}: {error.strerror}") from error


class OtlpTarget(Target, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A receiver of OTLP."""

    protocol: Annotated[
        Literal["grpc", "http"], Meta(description="OTLP over gRPC, or over HTTP")
    ] = "grpc"
    resource: Annotated[
        dict[str, str],
        Meta(description="more attributes of resources, such as `deployment.environment.name`"),
    ] = field(default_factory=dict)


class RemoteWrite(Target, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A receiver of Prometheus' remote write."""

    labels: Annotated[
        dict[str, str], Meta(description="what every series has; by default `job: coral-colony`")
    ] = field(default_factory=lambda: dict(_DEFAULTS.labels))


class Export(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Metrics of what is stored, for what the house already has."""

    interval: Annotated[Duration, Meta(description="how often metrics are sent")] = Duration(
        _DEFAULTS.interval_s
    )
    max_series: Annotated[
        int,
        Meta(ge=1, le=1_000_000, description="label sets of each kind; further ones are `other`"),
    ] = _DEFAULTS.max_series
    otlp: OtlpTarget = field(default_factory=OtlpTarget)
    remote_write: RemoteWrite = field(default_factory=RemoteWrite)

    @property
    def is_on(self) -> bool:
        """Whether anything is sent."""
        return bool(self.otlp.endpoint or self.remote_write.endpoint)

    def as_settings(self, name: str) -> ExportSettings:
        """For the exporter of the colony called NAME. Raises ValueError for files that cannot be
        used."""
        return ExportSettings(
            name,
            otlp=self.otlp.as_receiver("export.otlp"),
            otlp_protocol=self.otlp.protocol,
            resource=self.otlp.resource,
            remote_write=self.remote_write.as_receiver("export.remote_write"),
            labels=self.remote_write.labels,
            interval_s=self.interval,
            max_series=self.max_series,
        )


def problem(export: Export) -> str:
    """What is not accepted of these keys, or nothing."""
    for key, target in (("otlp", export.otlp), ("remote_write", export.remote_write)):
        if target.endpoint and not _is_url(target.endpoint):
            accepts = "give http://HOST:PORT or https://HOST:PORT, with a path behind it if need be"
            return f"export.{key}.endpoint: {shown(target.endpoint)} is not accepted; {accepts}"
    return ""


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname and parts.port)
    except ValueError:
        return False
