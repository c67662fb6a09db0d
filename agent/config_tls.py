"""The keys `tls.…` of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct


class Tls(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The encryption of gRPC over TCP."""

    certificate: Annotated[
        str,
        Meta(
            description="a PEM file with the certificate that every TCP listener shows, followed "
            "by those between it and its authority; empty: no TLS. It, the key and the "
            "authorities are read again when they change; see [TLS](tls.md)"
        ),
    ] = ""
    key: Annotated[
        str,
        Meta(description="a PEM file with its key, which only its owner and group may read"),
    ] = ""
    client_ca: Annotated[
        str,
        Meta(
            description="a PEM file with the authorities that sign clients' certificates; the "
            "connections of an authority that is removed are closed"
        ),
    ] = ""
    client_crl: Annotated[
        str,
        Meta(
            description="a PEM file with lists of revoked certificates, one of each authority that "
            "signs clients' certificates; the connections of clients that it revokes are closed. "
            "Empty: nothing is revoked"
        ),
    ] = ""
    client_certificates: Annotated[
        Literal["require", "request", "none"],
        Meta(
            description="`require`: clients without a certificate of `client_ca` are refused; "
            "`request`: they may come without one; `none`: they are not asked"
        ),
    ] = "require"
    insecure_plaintext: Annotated[
        bool,
        Meta(
            description="listen on TCP beyond loopback without TLS: whoever is on the way reads "
            "and changes everything, tokens too"
        ),
    ] = False


def problem(tls: Tls) -> str:
    """What is not accepted of these keys, or nothing."""
    if bool(tls.certificate) != bool(tls.key):
        lacking = "key" if tls.certificate else "certificate"
        return f"tls.{lacking}: give it too: a certificate and its key belong together"
    if tls.client_ca and not tls.certificate:
        return "tls.certificate: clients can show theirs only where there is TLS"
    if tls.certificate and not tls.client_ca and tls.client_certificates != "none":
        return (
            "tls.client_ca: give the authorities of clients' certificates, or set "
            "tls.client_certificates: none"
        )
    if tls.client_ca and tls.client_certificates == "none":
        return "tls.client_ca: tls.client_certificates is none, so nothing would use it"
    if tls.client_crl and not tls.client_ca:
        return "tls.client_ca: give the authorities whose certificates tls.client_crl revokes"
    return ""
