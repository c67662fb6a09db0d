"""Certificates for tests: authorities, and what they sign, as files."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = timedelta(days=1)
_OIDS = {
    "CN": NameOID.COMMON_NAME,
    "O": NameOID.ORGANIZATION_NAME,
    "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
}


def distinguished(**parts: str) -> x509.Name:
    """A name of PARTS, in the order of a certificate: `O` before `CN`."""
    return x509.Name([x509.NameAttribute(_OIDS[kind], value) for kind, value in parts.items()])


def alternatives(*names: str) -> list[x509.GeneralName]:
    """`spiffe://…` and other URIs, addresses and host names as subjectAltName has them."""
    found: list[x509.GeneralName] = []
    for name in names:
        if "://" in name:
            found.append(x509.UniformResourceIdentifier(name))
        elif name[0].isdigit() or ":" in name:
            found.append(x509.IPAddress(ipaddress.ip_address(name)))
        else:
            found.append(x509.DNSName(name))
    return found


@dataclass(frozen=True)
class Pair:
    """A certificate, its key, and the certificates between it and the authority."""

    certificate: x509.Certificate
    key: CertificateIssuerPrivateKeyTypes
    between: tuple[x509.Certificate, ...] = ()

    @property
    def chain_pem(self) -> bytes:
        return b"".join(
            each.public_bytes(Encoding.PEM) for each in (self.certificate, *self.between)
        )

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def serial(self) -> int:
        return self.certificate.serial_number

    def write(self, directory: Path, name: str) -> tuple[Path, Path]:
        """NAME.crt and NAME.key in DIRECTORY, each replaced in one step."""
        certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
        put(key, self.key_pem, 0o600)
        put(certificate, self.chain_pem)
        return certificate, key


def put(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Writes a file so that readers see all of it or nothing."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    new.chmod(mode)
    new.rename(path)


class Authority:
    """Signs certificates."""

    def __init__(
        self, name: str = "test authority", signer: Authority | None = None, days: float = 1
    ) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = distinguished(CN=name)
        builder = self._builder(self.name, signer or self, self.key, days)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        self.certificate = builder.sign((signer or self).key, SHA256())
        above = signer.between if signer else ()
        self.between: tuple[x509.Certificate, ...] = (self.certificate, *above) if signer else ()

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def write(self, path: Path, *others: Self) -> Path:
        """PATH with this authority and OTHERS."""
        put(path, b"".join(each.pem for each in (self, *others)))
        return path

    def sign(
        self,
        *names: str,
        subject: x509.Name | None = None,
        days: float = 1,
        key: CertificateIssuerPrivateKeyTypes | None = None,
        uses: Sequence[x509.ObjectIdentifier] = (
            ExtendedKeyUsageOID.SERVER_AUTH,
            ExtendedKeyUsageOID.CLIENT_AUTH,
        ),
    ) -> Pair:
        """A certificate for NAMES; with negative DAYS it expired so long ago."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = distinguished(CN="test") if subject is None else subject
        builder = self._builder(subject, self, key, days)
        if names:
            san = x509.SubjectAlternativeName(alternatives(*names))
            builder = builder.add_extension(san, not list(subject))
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), False)
        return Pair(builder.sign(self.key, SHA256()), key, self.between)

    def revoke(self, *pairs: Pair, days: float = 1) -> bytes:
        """The list of revoked certificates, PAIRS, in PEM; with negative DAYS it has expired."""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.name)
            .last_update(now - 30 * DAY)
            .next_update(now + timedelta(days=days))
        )
        for pair in pairs:
            revoked = x509.RevokedCertificateBuilder().serial_number(pair.serial)
            builder = builder.add_revoked_certificate(revoked.revocation_date(now - DAY).build())
        return builder.sign(self.key, SHA256()).public_bytes(Encoding.PEM)

    @staticmethod
    def _builder(
        subject: x509.Name,
        signer: Authority,
        key: CertificateIssuerPrivateKeyTypes,
        days: float,
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(signer.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 30 * DAY)
            .not_valid_after(now + timedelta(days=days))
        )
