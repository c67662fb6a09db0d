"""A certificate, its key and the authorities of clients: from files to a context for TLS.

Everything is read once and checked before it is used, so that a connection never meets half of a
rotation. Errors name the key of the configuration and the file. It knows nothing of listeners.
"""

from __future__ import annotations

import os
import re
import ssl
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NoReturn

from coral.agent.serving import revocation
from coral.agent.serving.certificates import Distrusted, digests
from coral.wire.settings.files import read_with_mode

Verify = Literal["require", "request", "none"]

_MOST_BYTES: Final = 1 << 20  # of a file: a bundle of every public authority has 220 KB
_OTHERS: Final = stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP
_PEM: Final = re.compile(
    rb"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----", re.ASCII
)
# For TLS 1.2; those of TLS 1.3 are all good. RFC 9325, section 4.2.
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
_VERIFY: Final = {
    "require": ssl.CERT_REQUIRED,
    "request": ssl.CERT_OPTIONAL,
    "none": ssl.CERT_NONE,
}
# Reasons of OpenSSL's that mean something else to those who configured it.
_REASONS: Final = {
    "KEY_VALUES_MISMATCH": "it is not the key of the certificate",
    "KEY_TYPE_MISMATCH": "it is not the key of the certificate",
    "NO_CERTIFICATE_ASSIGNED": "it is not the key of the certificate",
    "BAD_PASSWORD_READ": "the key is encrypted: give one without a passphrase",
    "BAD_DECRYPT": "the key is encrypted: give one without a passphrase",
    "NO_START_LINE": "it has no private key in PEM",
}


class CredentialsError(ValueError):
    """What is wrong with a certificate, a key or an authority; the message names the key."""


@dataclass(frozen=True, slots=True)
class Source:
    """What KEY of the configuration names: the file PATH, or, without one, the TEXT itself."""

    key: str
    path: Path | None = None
    text: str = ""

    def read(self, *, secret: bool = False) -> bytes:
        """Its bytes. A SECRET file may be read by its owner and group alone. Raises
        `CredentialsError`."""
        if self.path is None:
            return self.text.encode()
        try:
            content, mode = read_with_mode(self.path, _MOST_BYTES)
        except (OSError, ValueError) as error:
            self.refuse(getattr(error, "strerror", None) or str(error))
        if secret and mode & _OTHERS:
            self.refuse(
                f"others than its owner may read or write it (mode {stat.S_IMODE(mode):04o}): give "
                "a file of mode 0600, or 0640; in Kubernetes, set the volume's defaultMode to 0400"
            )
        return content

    def refuse(self, reason: str) -> NoReturn:
        """Raises `CredentialsError`."""
        where = f"{self.key}: {self.path}" if self.path else self.key
        raise CredentialsError(f"{where}: {reason}")


@dataclass(frozen=True, slots=True)
class Sources:
    """What a listener's TLS is made from."""

    certificate: Source
    key: Source
    client_ca: Source | None = None
    client_certificates: Verify = "none"
    protocols: tuple[str, ...] = ()
    """Of ALPN, RFC 7301."""
    least: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2
    most: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED
    client_crl: Source | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files."""
        found = (self.certificate, self.key, self.client_ca, self.client_crl)
        return tuple(each.path for each in found if each and each.path)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What new connections are made with."""

    context: ssl.SSLContext
    serial: str
    """Of the certificate, in hexadecimal digits."""
    authorities: frozenset[bytes]
    """SHA-256 of each certificate that clients' certificates may be signed by."""
    expiries_s: tuple[tuple[str, float], ...]
    """When the `certificate` expires, the last of the `client_ca`, and the first of the
    `client_crl`, in Unix seconds."""
    revoked: frozenset[int] = frozenset()
    """The serial numbers of clients' certificates that are refused."""

    def distrusted_since(self, before: Credentials) -> Distrusted:
        """What was accepted with those BEFORE, and is not with these."""
        if before is self:
            return Distrusted()
        return Distrusted(before.authorities - self.authorities, self.revoked - before.revoked)


def load(sources: Sources) -> Credentials:
    """Reads and checks SOURCES. Raises `CredentialsError`."""
    chain, key = sources.certificate.read(), sources.key.read(secret=True)
    context = _context(sources)
    _load_pair(context, sources, chain, key)
    serial, not_after_s = _own(sources, chain, key)
    expiries_s = [("certificate", not_after_s)]
    authorities: frozenset[bytes] = frozenset()
    if sources.client_ca:
        authorities, last_s = _load_authorities(context, sources.client_ca)
        expiries_s.append(("client_ca", last_s))
    revoked: frozenset[int] = frozenset()
    if sources.client_crl:
        revoked, first_s = _load_revoked(context, sources.client_crl)
        expiries_s += [("client_crl", first_s)] if first_s else []
    context.verify_mode = _VERIFY[sources.client_certificates]
    return Credentials(context, serial, authorities, tuple(expiries_s), revoked)


def _context(sources: Sources) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version, context.maximum_version = sources.least, sources.most
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION
    # A session that is resumed is not verified again. A context remembers those of its own clients
    # alone, and each change of files makes a new one; tickets would outlive it.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    # An authority between a root and clients is accepted as it is.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if sources.protocols:
        context.set_alpn_protocols(list(sources.protocols))
    return context


def _load_pair(context: ssl.SSLContext, sources: Sources, chain: bytes, key: bytes) -> None:
    if not _PEM.search(chain):
        sources.certificate.refuse("it has no certificate in PEM")
    try:
        with _as_file(chain) as chain_path, _as_file(key) as key_path:
            context.load_cert_chain(chain_path, key_path, password=_no_password)
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        # OpenSSL reads the certificate first, and says nothing of which file it failed in.
        of_certificate = reason.startswith(("EE_", "CA_")) or not _is_certificate(chain)
        source = sources.certificate if of_certificate else sources.key
        source.refuse(_REASONS.get(reason, reason.lower().replace("_", " ")))
    except (ValueError, OSError) as error:
        sources.key.refuse(str(error))


def _is_certificate(chain: bytes) -> bool:
    """Whether OpenSSL can read all of CHAIN."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=_text(chain))
    except ssl.SSLError:
        return False
    return True


def _no_password() -> str:
    """Otherwise OpenSSL would ask at the terminal."""
    raise ValueError(_REASONS["BAD_PASSWORD_READ"])


def _own(sources: Sources, chain: bytes, key: bytes) -> tuple[str, float]:
    """The certificate's serial number, and when it expires, in Unix seconds, as a client finds them
    in a handshake in memory: so what clients would refuse is refused here. Raises
    `CredentialsError`."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_pair(server, sources, chain, key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    leaf = _PEM.findall(chain)[0].decode()
    client.load_verify_locations(cadata=leaf)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    at_client = client.wrap_bio(to_client, to_server)
    at_server = server.wrap_bio(to_server, to_client, server_side=True)
    try:
        while not _shakes(at_client):
            _shakes(at_server)
    except ssl.SSLCertVerificationError as error:
        sources.certificate.refuse(error.verify_message)
    except ssl.SSLError as error:
        sources.certificate.refuse(error.reason or str(error))
    found = at_client.getpeercert() or {}
    return str(found["serialNumber"]), float(ssl.cert_time_to_seconds(str(found["notAfter"])))


def _shakes(end: ssl.SSLObject) -> bool:
    """Goes on with a handshake; whether it is over at this END."""
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _load_authorities(context: ssl.SSLContext, source: Source) -> tuple[frozenset[bytes], float]:
    """The digests of the authorities, and when the last of them expires, in Unix seconds. A bundle
    may have some that have expired."""
    bundle = source.read()
    found = [block.decode() for block in _PEM.findall(bundle)]
    if not found:
        source.refuse("it has no certificate in PEM")
    try:
        context.load_verify_locations(cadata="\n".join(found))
    except ssl.SSLError as error:
        source.refuse(error.reason or str(error))
    known = context.get_ca_certs()
    if not known:
        source.refuse("it has no certificate of an authority (basicConstraints CA:TRUE)")
    last_s = max(ssl.cert_time_to_seconds(str(each["notAfter"])) for each in known)
    return digests(ssl.PEM_cert_to_DER_cert(each) for each in found), float(last_s)


def _load_revoked(context: ssl.SSLContext, source: Source) -> tuple[frozenset[int], float | None]:
    """The serial numbers that lists revoke, and when the first of the lists expires, in Unix
    seconds: from then on OpenSSL refuses all certificates of its authority, so that one that has
    expired is not begun with."""
    found = revocation.lists_in(source.read())
    if not found:
        source.refuse("it has no list of revoked certificates in PEM (X509 CRL)")
    try:
        lists = [revocation.parse(each) for each in found]
        # The lists alone: OpenSSL would trust any certificate beside them as an authority.
        with _as_file(b"".join(found)) as path:
            context.load_verify_locations(path)
    except ssl.SSLError as error:
        source.refuse(error.reason or str(error))
    except ValueError as error:
        source.refuse(f"it is no list of revoked certificates: {error}")
    first_s = min((it.next_update_s for it in lists if it.next_update_s is not None), default=None)
    if first_s is not None and first_s < time.time():
        source.refuse("a list in it has expired: ask its authority for a new one")
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return frozenset().union(*(it.serials for it in lists)), first_s


def _text(content: bytes) -> str:
    return content.decode("ascii", "replace").replace("\ufffd", "?")


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """The path of a file in memory: ssl reads keys from paths alone, where a second look could find
    another file than the first."""
    descriptor = os.memfd_create("coral-tls")
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
