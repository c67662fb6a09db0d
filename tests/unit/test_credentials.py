"""Files of TLS: what is refused at start and why, and what happens when they change."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from coral.agent.serving.certificates import Distrusted
from coral.agent.serving.credentials import CredentialsError, Source, Sources, Verify, load
from coral.agent.serving.rotation import Rotation
from tests.certificates import Authority, put


def sources(directory: Path, verify: Verify = "require") -> Sources:
    return Sources(
        Source("tls.certificate", directory / "server.crt"),
        Source("tls.key", directory / "server.key"),
        Source("tls.client_ca", directory / "ca.crt") if verify != "none" else None,
        verify,
        ("h2",),
    )


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """One that has signed what `sources` names."""
    found = Authority()
    found.write(tmp_path / "ca.crt")
    found.sign("localhost").write(tmp_path, "server")
    return found


def test_what_was_read_says_when_it_expires_and_whom_it_trusts(
    authority: Authority, tmp_path: Path
) -> None:
    pair = authority.sign("localhost", days=7)
    pair.write(tmp_path, "server")
    read = load(sources(tmp_path))
    expiries = dict(read.expiries_s)
    assert int(read.serial, 16) == pair.serial
    assert expiries["certificate"] == pair.certificate.not_valid_after_utc.timestamp()
    assert expiries["client_ca"] == authority.certificate.not_valid_after_utc.timestamp()
    assert len(read.authorities) == 1
    assert read.context.verify_mode is ssl.CERT_REQUIRED
    assert read.context.num_tickets == 0


def test_a_chain_and_a_bundle_with_one_that_has_expired_are_accepted(tmp_path: Path) -> None:
    root = Authority("root", days=9)
    between = Authority("between", root, days=8)
    between.sign("localhost").write(tmp_path, "server")
    root.write(tmp_path / "ca.crt", Authority("old", days=-1), between)
    read = load(sources(tmp_path))
    assert len(read.authorities) == 3
    last_s = dict(read.expiries_s)["client_ca"]
    assert last_s == root.certificate.not_valid_after_utc.timestamp()
    assert last_s > datetime.now(UTC).timestamp()


def encrypted(directory: Path) -> None:
    key = Authority().sign("localhost").key
    how = BestAvailableEncryption(b"passphrase")
    put(directory / "server.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how), 0o600)


def for_clients(directory: Path) -> None:
    uses = (ExtendedKeyUsageOID.CLIENT_AUTH,)
    Authority().sign("localhost", uses=uses).write(directory, "server")


def a_directory(directory: Path) -> None:
    (directory / "ca.crt").unlink()
    (directory / "ca.crt").mkdir()


def a_fifo(directory: Path) -> None:
    (directory / "server.key").unlink()
    os.mkfifo(directory / "server.key", 0o600)


def short(directory: Path) -> None:
    key = rsa.generate_private_key(65537, 1024)
    Authority().sign("localhost", key=key).write(directory, "server")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no certificate": (
        lambda d: (d / "server.crt").unlink(), "tls.certificate: .*server.crt: No such file",
    ),
    "no key": (lambda d: (d / "server.key").unlink(), "tls.key: .*server.key: No such file"),
    "a directory": (
        a_directory,
        "tls.client_ca: .*ca.crt: Is a directory",
    ),
    "a fifo": (
        a_fifo,
        "tls.key: .*: it is not a regular file",
    ),
    "no PEM": (
        lambda d: put(d / "server.crt", b"x"), "tls.certificate: .*: it has no certificate in PEM",
    ),
    "cut off": (
        lambda d: put(d / "server.crt", (d / "server.crt").read_bytes()[:300]),
        "tls.certificate: .*: it has no certificate in PEM",
    ),
    "not base64": (
        lambda d: put(
            d / "server.crt", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
        ),
        "tls.certificate: .*server.crt: ",
    ),
    "an empty key": (lambda d: put(d / "server.key", b"", 0o600), "tls.key: .*server.key: "),
    "another's key": (
        lambda d: put(d / "server.key", Authority().sign("x").key_pem, 0o600),
        "tls.key: .*: it is not the key of the certificate",
    ),
    "a key of another type": (
        lambda d: put(
            d / "server.key",
            Authority().sign("x", key=rsa.generate_private_key(65537, 2048)).key_pem,
            0o600,
        ),
        "tls.key: .*: it is not the key of the certificate",
    ),
    "an encrypted key": (encrypted, "tls.key: .*: the key is encrypted"),
    "a key that all may read": (
        lambda d: (d / "server.key").chmod(0o644), r"tls.key: .*others .* \(mode 0644\)",
    ),
    "a key that its group may write": (
        lambda d: (d / "server.key").chmod(0o660), r"tls.key: .*others .* \(mode 0660\)",
    ),
    "expired": (
        lambda d: Authority().sign("localhost", days=-1).write(d, "server"),
        "tls.certificate: .*server.crt: certificate has expired",
    ),
    "meant for clients": (for_clients, "tls.certificate: .*purpose"),
    "a short key": (short, "tls.certificate: .*too small"),
    "no authority": (
        lambda d: put(d / "ca.crt", Authority().sign("x").chain_pem),
        "tls.client_ca: .*: it has no certificate of an authority",
    ),
    "no authorities": (
        lambda d: put(d / "ca.crt", b""), "tls.client_ca: .*: it has no certificate in PEM",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.usefixtures("authority")
def test_what_cannot_be_used_is_refused_by_the_key_that_names_it(what: str, tmp_path: Path) -> None:
    breaks, message = BROKEN[what]
    breaks(tmp_path)
    with pytest.raises(CredentialsError, match=f"^{message}"):
        load(sources(tmp_path))


def test_a_change_is_used_and_a_bad_one_is_not(authority: Authority, tmp_path: Path) -> None:
    rotation = Rotation("grpc", sources(tmp_path))
    first = rotation.current
    assert not rotation.is_due()
    pair = authority.sign("localhost", days=3)
    put(tmp_path / "server.crt", pair.chain_pem)
    assert rotation.is_due()
    rotation.take(rotation.try_to_read())  # half of a rotation
    assert rotation.current is first
    assert (rotation.counts.failures, rotation.counts.reloads) == (1, 0)
    assert not rotation.is_due()
    put(tmp_path / "server.key", pair.key_pem, 0o600)
    assert rotation.is_due()
    rotation.take(rotation.try_to_read())
    assert int(rotation.current.serial, 16) == pair.serial
    assert (rotation.counts.failures, rotation.counts.reloads) == (1, 1)
    assert rotation.counts.expiries_s == dict(rotation.current.expiries_s)


def test_the_links_of_a_volume_of_kubernetes_are_followed(
    authority: Authority, tmp_path: Path
) -> None:
    for version, pair in (("..1", authority.sign("a")), ("..2", authority.sign("b"))):
        (tmp_path / version).mkdir()
        pair.write(tmp_path / version, "server")
        authority.write(tmp_path / version / "ca.crt")
    (tmp_path / "..data").symlink_to("..1")
    volume = tmp_path / "volume"
    volume.mkdir()
    for name in ("server.crt", "server.key", "ca.crt"):
        (volume / name).symlink_to(f"../..data/{name}")
    rotation = Rotation("grpc", sources(volume))
    before = rotation.current.serial
    (tmp_path / "..new").symlink_to("..2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    assert rotation.is_due()
    rotation.take(rotation.try_to_read())
    assert rotation.current.serial != before


def test_those_that_depend_on_an_authority_learn_of_its_removal(
    authority: Authority, tmp_path: Path
) -> None:
    other = Authority("other")
    authority.write(tmp_path / "ca.crt", other)
    rotation = Rotation("grpc", sources(tmp_path))
    removed: list[Distrusted] = []
    rotation.changed = removed.append
    both = rotation.current.authorities
    authority.write(tmp_path / "ca.crt")
    assert rotation.is_due()
    rotation.take(rotation.try_to_read())
    assert removed == [Distrusted(authorities=both - rotation.current.authorities)]
    assert len(removed[0].authorities) == 1


def with_list(directory: Path, content: bytes) -> Sources:
    put(directory / "clients.crl", content)
    found = sources(directory)
    return replace(found, client_crl=Source("tls.client_crl", directory / "clients.crl"))


def test_lists_of_revoked_certificates_are_read_and_say_when_the_first_expires(
    authority: Authority, tmp_path: Path
) -> None:
    other = Authority("other")
    first, second, third = authority.sign("a"), authority.sign("b"), other.sign("c")
    content = authority.revoke(first, second, days=3) + other.pem + other.revoke(third, days=2)
    read = load(with_list(tmp_path, content))
    assert len(read.context.get_ca_certs()) == 1  # a certificate among the lists is not trusted
    assert read.revoked == {pair.serial for pair in (first, second, third)}
    assert read.context.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF
    left_s = dict(read.expiries_s)["client_crl"] - datetime.now(UTC).timestamp()
    assert 1.9 * 86_400 < left_s <= 2 * 86_400
    assert load(with_list(tmp_path, authority.revoke())).revoked == frozenset()
    assert not load(sources(tmp_path)).context.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it has no list of revoked certificates in PEM"),
        (Authority().pem, "it has no list of revoked certificates in PEM"),
        (Authority().revoke(days=-1), "a list in it has expired"),
        (b"-----BEGIN X509 CRL-----\nMIIB\n-----END X509 CRL-----\n", "it is no list of revoked"),
        (b"-----BEGIN X509 CRL-----\nA\n-----END X509 CRL-----\n", "it is no list of revoked"),
    ],
    ids=["empty", "a certificate", "expired", "cut off", "not base64"],
)
@pytest.mark.usefixtures("authority")
def test_a_list_that_cannot_be_used_is_refused_by_its_key(
    content: bytes, why: str, tmp_path: Path
) -> None:
    with pytest.raises(CredentialsError, match=f"^tls.client_crl: .*clients.crl: {why}"):
        load(with_list(tmp_path, content))


def test_those_that_have_connections_learn_of_whom_a_new_list_revokes(
    authority: Authority, tmp_path: Path
) -> None:
    early, late = authority.sign("early"), authority.sign("late")
    rotation = Rotation("grpc", with_list(tmp_path, authority.revoke(early)))
    removed: list[Distrusted] = []
    rotation.changed = removed.append
    put(tmp_path / "clients.crl", authority.revoke(early, late))
    assert rotation.is_due()
    rotation.take(rotation.try_to_read())
    assert removed == [Distrusted(serials=frozenset({late.serial}))]
    put(tmp_path / "clients.crl", authority.revoke(early, late, days=-1))
    assert rotation.is_due()
    rotation.take(rotation.try_to_read())  # what was good stays in use
    assert rotation.current.revoked == {early.serial, late.serial}
    assert rotation.counts.failures == 1
