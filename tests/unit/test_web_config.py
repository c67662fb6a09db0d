"""The metrics port's web configuration file, and passwords in it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import yaml

from coral.agent.serving import passwords, web_config
from coral.agent.serving.credentials import CredentialsError
from coral.agent.serving.passwords import Passwords
from coral.agent.serving.web_guard import WebGuard
from tests.certificates import Authority

HASH = "$2b$04$" + "a" * 53
FILES = {"cert_file": "server.crt", "key_file": "server.key"}


def written(directory: Path, content: Mapping[str, Any]) -> Path:
    path = directory / "web.yml"
    path.write_text(yaml.safe_dump(dict(content)))
    return path


def test_a_file_of_exporter_toolkit_is_read(tmp_path: Path) -> None:
    tls = {
        **FILES, "client_auth_type": "RequireAndVerifyClientCert", "client_ca_file": "/ca.crt",
        "client_allowed_sans": ["prometheus"], "min_version": "TLS13",
    }  # fmt: skip
    content = {
        "tls_server_config": tls,
        "http_server_config": {"http2": True, "headers": {"X-Frame-Options": "deny"}},
        "basic_auth_users": {"ann": HASH},
    }
    found = web_config.read(written(tmp_path, content))
    assert found.users == {"ann": HASH.encode()}
    assert found.headers == {"X-Frame-Options": "deny"}
    assert found.allowed_names == {"prometheus"}
    assert found.tls
    assert found.tls.client_certificates == "require"
    assert found.tls.paths == (
        tmp_path / "server.crt", tmp_path / "server.key", Path("/ca.crt"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tls_config": {}}, "unknown field `tls_config`"),
        ({"tls_server_config": {"cert_file": "a"}}, "give cert_file and key_file"),
        ({"tls_server_config": {**FILES, "cert": "x"}}, "give cert or cert_file, not both"),
        ({"tls_server_config": {**FILES, "client_auth_type": "RequireAnyClientCert"}},
         "client_auth_type: 'RequireAnyClientCert' is not accepted; give one of NoClientCert"),
        ({"tls_server_config": {**FILES, "client_ca_file": "a"}}, "client_auth_type that verifies"),
        ({"tls_server_config": {**FILES, "client_auth_type": "RequireAndVerifyClientCert"}},
         "give client_ca_file"),
        ({"tls_server_config": {**FILES, "min_version": "TLS10"}}, "'TLS10' is no version"),
        ({"tls_server_config": {**FILES, "cipher_suites": ["x"]}}, "unknown field `cipher_suites`"),
        ({"tls_server_config": {**FILES, "client_allowed_sans": ["x"]}}, "client_allowed_sans"),
        ({"basic_auth_users": {"ann": "secret"}}, r"basic_auth_users\.ann: give a hash of bcrypt"),
        ({"basic_auth_users": {"ann": HASH.replace("04", "15")}}, "a cost of at most 14"),
        ({"http_server_config": {"headers": {"X-Other": "a"}}}, "give only Content-Security"),
        ({"http_server_config": {"headers": {"X-Frame-Options": "a\nb"}}}, "give only Content-Sec"),
    ],
)  # fmt: skip
def test_what_the_agent_cannot_do_is_refused(
    content: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CredentialsError, match=f"^metrics_web_config: .*web.yml: .*{message}"):
        web_config.read(written(tmp_path, content))


def basic(name: str, password: str) -> bytes:
    return b"Basic " + base64.b64encode(f"{name}:{password}".encode())


async def test_a_password_is_hashed_once_and_its_verdict_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    users = {"ann": bcrypt.hashpw(b"right", bcrypt.gensalt(4))}
    hashed: list[bytes] = []
    real = passwords._matches

    def counting(password: bytes, against: bytes) -> bool:
        hashed.append(password)
        return real(password, against)

    monkeypatch.setattr(passwords, "_matches", counting)
    check = Passwords()
    many = await asyncio.gather(*(check.accept(basic("ann", "right"), users) for _ in range(20)))
    assert many == [True] * 20
    assert await check.accept(basic("ann", "wrong"), users) is False
    assert await check.accept(basic("ann", "wrong"), users) is False
    assert hashed == [b"right", b"wrong"]
    # A user that is not known costs as much; a changed hash is another question.
    assert await check.accept(basic("bob", "right"), users) is False
    other = {"ann": bcrypt.hashpw(b"other", bcrypt.gensalt(4))}
    assert await check.accept(basic("ann", "right"), other) is False
    assert len(hashed) == 4


async def test_guesses_do_not_drive_out_the_verdict_of_the_one_that_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passwords, "_matches", lambda password, _: password == b"right")
    check, users = Passwords(), {"ann": b"x"}
    assert await check.accept(basic("ann", "right"), users)
    for guess in range(300):
        assert not await check.accept(basic("ann", f"{guess}"), users)
    assert len(check._verdicts) == 256
    assert True in check._verdicts.values()


@pytest.mark.parametrize(
    "header",
    [None, b"", b"Basic", b"Basic !", b"Bearer x", b"Basic " + base64.b64encode(b"nocolon"),
     b"Basic " + base64.b64encode(b"ann:" + b"x" * 73), b"Basic " + base64.b64encode(b"\xff:x")],
)  # fmt: skip
async def test_headers_that_are_none_are_refused_without_a_hash(
    header: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[bytes] = []
    monkeypatch.setattr(passwords, "_matches", lambda password, _: hashed.append(password))
    assert not await Passwords().accept(header, {"ann": HASH.encode()})
    assert not hashed


def test_a_file_that_breaks_leaves_what_was_good(tmp_path: Path) -> None:
    authority = Authority()
    authority.sign("localhost").write(tmp_path, "server")
    content = {"tls_server_config": FILES, "basic_auth_users": {"ann": HASH}}
    guard = WebGuard(written(tmp_path, content))
    assert guard.refuses
    context = guard.context
    assert context
    assert not guard.is_due()
    written(tmp_path, {"tls_server_config": {}})
    assert guard.is_due()
    guard.take(guard.try_to_read())
    assert guard.context is context
    assert guard.counts.failures == 1
    authority.sign("localhost").write(tmp_path, "server")  # a file that it names
    written(tmp_path, {"tls_server_config": FILES})
    assert guard.is_due()
    guard.take(guard.try_to_read())
    assert guard.context is not context
    assert not guard.refuses
    assert set(guard.counts.expiries_s) == {"certificate"}
