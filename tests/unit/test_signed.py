"""Signed programs: Ed25519 as openssl signs, and what an installation refuses, and why."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

import pytest

from coral.bpf.loading import ed25519, signed
from deploy.image import signing
from tests.support import ROOT

# RFC 8032, section 7.1, test 1: the signature of an empty message.
RFC_KEY: Final = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
RFC_SIGNATURE: Final = (
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
    "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
)
ORDER: Final = 2**252 + 27742317777372353535851937790883648493
NAME: Final = "syscall_stats.bpf.o"


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return signing.key_at(tmp_path_factory.mktemp("keys") / "key.pem")


@pytest.fixture
def programs(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The agent's programs, signed, as an installation has them."""
    for name in (signed.ENV_KEY, signed.ENV_OBJECT_DIR):
        monkeypatch.delenv(name, raising=False)
    directory = tmp_path / "programs"
    for path in (ROOT / "bpf/programs").glob("*/*.bpf.o"):
        (directory / path.parent.name).mkdir(parents=True)
        shutil.copy(path, directory / path.parent.name)
    signing.sign_programs(directory, key)
    return directory


def content(programs: Path, name: str = NAME) -> bytes:
    return (programs / name.partition(".")[0] / name).read_bytes()


# Ed25519


def test_the_signature_of_the_rfc_is_verified_and_that_of_another_message_is_not() -> None:
    signature, key = bytes.fromhex(RFC_SIGNATURE), bytes.fromhex(RFC_KEY)
    assert ed25519.verify(signature, b"", key)
    assert not ed25519.verify(signature, b"x", key)


def test_what_openssl_signed_is_verified_and_no_bit_of_it_may_change(key: Path) -> None:
    public = signing.raw_public_key(key)
    for length in (1, 64, 1000):
        message = (bytes(range(256)) * 4)[:length]
        signature = signing.signature(message, key)
        assert ed25519.verify(signature, message, public)
        assert not ed25519.verify(signature, message + b"\0", public)
    for bit in range(0, 8 * ed25519.SIGNATURE_BYTES, 37):
        changed = bytearray(signature)
        changed[bit // 8] ^= 1 << bit % 8
        assert not ed25519.verify(bytes(changed), message, public)


def test_a_second_form_of_the_same_signature_is_refused(key: Path) -> None:
    """Its number plus the order of the base point satisfies the equation too (RFC 8032, 5.1.7)."""
    signature = signing.signature(b"message", key)
    number = int.from_bytes(signature[32:], "little") + ORDER
    again = signature[:32] + number.to_bytes(32, "little")
    assert not ed25519.verify(again, b"message", signing.raw_public_key(key))


@pytest.mark.parametrize(
    "public",
    [
        b"",
        bytes(31),
        bytes(33),
        b"\xff" * 32,  # y is no number of the field
        (2).to_bytes(32, "little"),  # no point of the curve has this y
        (1 | 1 << 255).to_bytes(32, "little"),  # x = 0 cannot be odd
    ],
)
def test_what_is_no_key_verifies_nothing(public: bytes) -> None:
    assert not ed25519.verify(bytes.fromhex(RFC_SIGNATURE), b"", public)


# Programs


def test_an_installation_without_a_key_accepts_what_was_built(programs: Path) -> None:
    (programs / "objects.pub").unlink()
    assert not signed.required(programs)
    signed.check(NAME, b"anything", programs)


def test_signed_programs_are_accepted_each_under_its_name(programs: Path) -> None:
    for path in programs.glob("*/*.bpf.o"):
        signed.check(path.name, path.read_bytes(), programs)
    with pytest.raises(signed.UnsignedError, match=r"^it is not the program that was signed$"):
        signed.check(NAME, content(programs, "tcp_metrics.bpf.o"), programs)


def refused(programs: Path, message: str, name: str = NAME) -> None:
    with pytest.raises(signed.UnsignedError, match=f"^{re.escape(message)}"):
        signed.check(name, content(programs), programs)


def test_a_changed_program_is_refused(programs: Path) -> None:
    with pytest.raises(signed.UnsignedError, match=r"^it is not the program that was signed$"):
        signed.check(NAME, content(programs) + b"\0", programs)


def test_a_program_that_nobody_signed_is_refused(programs: Path) -> None:
    refused(programs, "the signed objects.sha256 has no other.bpf.o", "other.bpf.o")


def test_a_list_that_was_changed_with_its_program_is_refused(programs: Path) -> None:
    listed = programs / "objects.sha256"
    listed.write_text(listed.read_text().replace("a", "b"))
    refused(programs, "the signature of objects.sha256 is not by the key of this installation")


@pytest.mark.parametrize("name", ["objects.sha256", "objects.sha256.sig"])
def test_without_the_list_or_its_signature_nothing_is_loaded(programs: Path, name: str) -> None:
    (programs / name).unlink()
    refused(programs, f"{programs / name} cannot be read (No such file or directory)")


@pytest.mark.parametrize("name", ["objects.pub", "objects.sha256.sig"])
def test_what_is_not_base64_is_refused(programs: Path, name: str) -> None:
    (programs / name).write_text("no base64!\n")
    refused(programs, "the signature of objects.sha256 or its key is not base64")


def test_a_key_from_the_environment_decides(
    programs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = (programs / "objects.pub").read_text().strip()
    (programs / "objects.pub").unlink()
    monkeypatch.setenv(signed.ENV_KEY, own)
    assert signed.required(programs)
    signed.check(NAME, content(programs), programs)
    other = signing.key_at(tmp_path / "other.pem")
    signing.sign_programs(programs, other)
    refused(programs, "the signature of objects.sha256 is not by the key of this installation")


def test_a_signed_installation_refuses_another_directory_of_programs(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(signed.ENV_OBJECT_DIR, "/tmp")
    message = "CORAL_BPF_OBJECTS is set, but this installation loads only the programs that were"
    refused(programs, message)
    with pytest.raises(signed.UnsignedError, match=f"^{message}"):
        signed.check_environment(programs)
    (programs / "objects.pub").unlink()
    signed.check_environment(programs)
