"""The keys `otlp.…` of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from msgspec import Meta, Struct, field

from coral.agent.config_units import Duration
from coral.wire.settings.words import shown


class Otlp(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where metrics and spans are sent."""

    endpoint: Annotated[
        str,
        Meta(
            description="send metrics and spans by OTLP to this receiver, `http://HOST:PORT` or, "
            "over TLS, `https://HOST:PORT`; empty: none. See [otlp](otlp.md)"
        ),
    ] = ""
    protocol: Annotated[
        Literal["grpc", "http"],
        Meta(
            description="OTLP over gRPC, or over HTTP in protobuf: then `endpoint` can have a path"
        ),
    ] = "grpc"
    metrics: Annotated[bool, Meta(description="send what /metrics has")] = True
    spans: Annotated[
        bool,
        Meta(
            description="send requests as spans, where a session of `http_latency` with "
            "`mode=events` and `traceparent=true` saw the trace that they belong to"
        ),
    ] = True
    interval: Annotated[Duration, Meta(description="how often to send metrics")] = Duration(30)
    ca_file: Annotated[
        str, Meta(description="the CAs of the receiver, in PEM; empty: those of this machine")
    ] = ""
    headers_file: Annotated[
        str, Meta(description="a file with headers for the receiver, a `NAME: VALUE` a line")
    ] = ""
    resource: Annotated[
        dict[str, str],
        Meta(description="more attributes of the resource, such as `deployment.environment.name`"),
    ] = field(default_factory=dict)


def problem(otlp: Otlp) -> str:
    """What is not accepted of these keys, or nothing."""
    if not otlp.endpoint or _is_endpoint(otlp):
        return ""
    return (
        f"otlp.endpoint: {shown(otlp.endpoint)} is not accepted; give http://HOST:PORT, "
        "https://HOST:PORT, with `protocol: http` and a path behind it if need be, or nothing"
    )


def _is_endpoint(otlp: Otlp) -> bool:
    try:
        parts = urlsplit(otlp.endpoint)
        port = parts.port
    except ValueError:
        return False
    address = f"{parts.scheme}://{parts.netloc}"
    accepted = address if otlp.protocol == "grpc" else address + parts.path
    return (
        parts.scheme in ("http", "https")
        and bool(parts.hostname and port)
        and "@" not in parts.netloc
        and otlp.endpoint == accepted
        and otlp.endpoint.isascii()
        and " " not in otlp.endpoint
    )
