"""A client's certificate as the agent knows it: names that roles and logs can use. Does no I/O.

It reads what `ssl.SSLSocket.getpeercert()` returns of a certificate that was verified.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

_MOST_NAMES: Final = 64
_MOST_SPIFFE_BYTES: Final = 2048
# https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md, section 2
_SPIFFE: Final = re.compile(r"spiffe://[a-z0-9._-]{1,255}(/(?!\.{1,2}(/|$))[A-Za-z0-9._-]+)*")
_DNS: Final = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
# RFC 4514, section 3; OpenSSL's long names of the others are kept.
_SHORT: Final = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
    "streetAddress": "STREET",
    "userId": "UID",
}
_ESCAPED: Final = frozenset('"+,;<>\\')


@dataclass(frozen=True, slots=True)
class Certificate:
    """The certificate that a client has proved to hold the key of."""

    subject: str
    """As in RFC 4514, such as `CN=colony,O=shop`."""
    issuer: str
    serial: str
    """In hexadecimal digits, as OpenSSL prints it."""
    not_after_s: float
    """When it expires, in Unix seconds."""
    tls_version: str
    """Such as `TLSv1.3`."""
    names: tuple[str, ...]
    """Who the client is, the most specific first: `spiffe://td/path`, `subject:CN=…`, `dns:…`."""
    chain: frozenset[bytes]
    """SHA-256 of each certificate of the verified chain, the client's own and the authority's."""


class Distrusted(NamedTuple):
    """What is trusted no more."""

    authorities: frozenset[bytes] = frozenset()
    """SHA-256 of certificates that vouched for others."""
    serials: frozenset[int] = frozenset()
    """Of clients' certificates. Another authority may have given the same number: its client loses
    a connection, and gets the next one."""

    def reason(self, certificate: Certificate) -> str:
        """Why CERTIFICATE is not accepted any more; empty if it is."""
        if certificate.chain & self.authorities:
            return "its authority is trusted no more"
        if self.serials and int(certificate.serial or "0", 16) in self.serials:
            return "its certificate was revoked"
        return ""


def certificate_of(
    found: Mapping[str, Any], tls_version: str, chain: Iterable[bytes]
) -> Certificate:
    """FOUND is what Python's ssl has of the certificate, CHAIN the verified chain in DER."""
    return Certificate(
        subject=rfc4514(found.get("subject", ())),
        issuer=rfc4514(found.get("issuer", ())),
        serial=str(found.get("serialNumber", "")),
        not_after_s=float(ssl.cert_time_to_seconds(found["notAfter"])),
        tls_version=tls_version,
        names=names_of(found),
        chain=digests(chain),
    )


def digests(certificates: Iterable[bytes]) -> frozenset[bytes]:
    """SHA-256 of each of CERTIFICATES, which are in DER."""
    return frozenset(hashlib.sha256(each).digest() for each in certificates)


def names_of(found: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in a certificate. A SPIFFE id counts only where it is the one URI in it, as the
    standard for X.509-SVIDs demands; of the other names, those that are no plain host name, such as
    wildcards, are left out."""
    alternatives = found.get("subjectAltName", ())
    uris = [value for kind, value in alternatives if kind == "URI"]
    names = [uri for uri in uris if len(uris) == 1 and _is_spiffe(uri)]
    if subject := rfc4514(found.get("subject", ())):
        names.append(f"subject:{subject}")
    names += [
        f"dns:{value.lower()}"
        for kind, value in alternatives
        if kind == "DNS" and _DNS.fullmatch(value)
    ]
    return tuple(dict.fromkeys(names))[:_MOST_NAMES]


def _is_spiffe(uri: str) -> bool:
    return len(uri) <= _MOST_SPIFFE_BYTES and bool(_SPIFFE.fullmatch(uri))


def rfc4514(name: Iterable[Iterable[tuple[str, str]]]) -> str:
    """A distinguished NAME, as Python's ssl has it, as text: the last part first (RFC 4514, 2.1).
    What cannot be printed is escaped, so that the text is one line."""
    parts = (
        "+".join(f"{_SHORT.get(kind, kind)}={_escaped(value)}" for kind, value in part)
        for part in reversed(tuple(name))
    )
    return ",".join(parts)


def _escaped(value: str) -> str:
    """RFC 4514, 2.4."""
    last = len(value) - 1
    escaped = []
    for at, char in enumerate(value):
        at_an_end = (char == " " and at in (0, last)) or (char == "#" and at == 0)
        if char in _ESCAPED or at_an_end:
            escaped.append(f"\\{char}")
        elif char.isprintable():
            escaped.append(char)
        else:
            escaped += [f"\\{byte:02x}" for byte in char.encode(errors="surrogatepass")]
    return "".join(escaped)
