"""Lists of revoked certificates (RFC 5280, section 5): until when they hold, and whom they revoke.

OpenSSL checks clients against them, and their signatures, in each handshake. It tells nobody what
is in them.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final, NamedTuple

_PEM: Final = re.compile(
    rb"-----BEGIN X509 CRL-----([A-Za-z0-9+/=\s]+)-----END X509 CRL-----", re.ASCII
)
# Tags of DER, X.690, 8.1.2.
_INTEGER: Final = 0x02
_SEQUENCE: Final = 0x30
_UTC_TIME: Final = 0x17
_GENERALIZED_TIME: Final = 0x18
_LONG: Final = 0x80  # the length is in the bytes that follow, X.690, 8.1.3.5
_FIRST_OF_1900: Final = (
    50  # years of two digits from here on are of the 20th century, RFC 5280, 4.1.2.5.1
)


class RevocationList(NamedTuple):
    """What one authority has revoked."""

    next_update_s: float | None
    """When it expires, in Unix seconds; None if it says nothing of that."""
    serials: frozenset[int]


class _Element(NamedTuple):
    tag: int
    content: memoryview


def lists_in(pem: bytes) -> list[bytes]:
    """The lists in a file, each in PEM, without what is between them."""
    return [block[0] + b"\n" for block in _PEM.finditer(pem)]


def parse(pem: bytes) -> RevocationList:
    """One list of `lists_in`. Raises ValueError for what is none."""
    found = _PEM.match(pem)
    der = base64.b64decode(found[1]) if found else b""
    try:
        (whole,) = _elements(memoryview(der))
        signed = next(_elements(whole.content))
        return _of(list(_elements(signed.content)))
    except (IndexError, StopIteration) as error:
        raise ValueError("it is cut off") from error


def _of(fields: list[_Element]) -> RevocationList:
    """FIELDS are those of TBSCertList, RFC 5280, 5.1: version, signature, issuer, thisUpdate,
    nextUpdate, revokedCertificates, extensions, of which only three are always there."""
    rest = fields[1:] if fields[0].tag == _INTEGER else fields
    times = [each for each in rest if each.tag in (_UTC_TIME, _GENERALIZED_TIME)]
    # The algorithm, the issuer, and what was revoked.
    sequences = [each for each in rest if each.tag == _SEQUENCE]
    entries = _elements(sequences[2].content) if len(sequences) > 2 else iter(())  # noqa: PLR2004
    serials = frozenset(
        int.from_bytes(next(_elements(entry.content)).content, "big", signed=True)
        for entry in entries
    )
    return RevocationList(_time_s(times[1]) if len(times) > 1 else None, serials)


def _time_s(element: _Element) -> float:
    text = bytes(element.content).decode("ascii")
    if element.tag == _UTC_TIME:
        text = f"{19 if int(text[:2]) >= _FIRST_OF_1900 else 20}{text}"
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _elements(data: memoryview) -> Iterator[_Element]:
    """The elements that follow each other in DATA."""
    at = 0
    while at < len(data):
        tag, length = data[at], data[at + 1]
        at += 2
        if length >= _LONG:
            count = length - _LONG
            length = int.from_bytes(data[at : at + count], "big")
            at += count
        if at + length > len(data):
            raise ValueError("it is cut off")
        yield _Element(tag, data[at : at + length])
        at += length
