"""A bus that is encrypted and wants to know who connects."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import nkeys
import pytest
from nacl.signing import SigningKey
from structlog.testing import capture_logs

from coral.colony.bus.connection import BusError, Connection
from coral.colony.bus.publisher import Publisher
from coral.colony.bus.settings import BusSettings
from tests.bus import NatsServer, Scripted, nats_server, settings_for
from tests.certificates import Authority, put
from tests.colony import until

Lines = list[Any]


def tls_lines(server: NatsServer, authority: Authority, directory: Path) -> str:
    certificate, key = authority.sign(server.host).write(directory, "nats")
    return f"""
        tls {{ cert_file: "{certificate}", key_file: "{key}", verify: true,
               ca_file: "{directory}/clients.crt" }}
        """


def told(lines: Lines, words: str) -> bool:
    return any(words in line.get("reason", "") for line in lines)


async def is_told(settings: BusSettings, *words: str) -> None:
    """A connection with SETTINGS does not come about, and the log says why: one of WORDS."""
    connection = Connection(settings, "test")
    with capture_logs() as lines:
        connecting = _opening(connection)
        await until(lambda: any(told(lines, each) for each in words) or connecting.done())
        assert not connecting.done(), connecting
        connecting.cancel()
        await connection.close()


def _opening(connection: Connection) -> Any:
    import asyncio  # noqa: PLC0415

    return asyncio.create_task(connection.open())


async def test_certificates_and_passwords_are_read_again_at_each_connection(
    tmp_path: Path,
) -> None:
    first, second = Authority("first"), Authority("second")
    first.write(tmp_path / "clients.crt")
    ca, password = first.write(tmp_path / "ca.crt"), tmp_path / "password"
    certificate, key = first.sign("colony").write(tmp_path, "colony")
    put(password, b"before\n", 0o600)
    server = NatsServer(tmp_path / "nats")

    def configured(authority: Authority, secret: str) -> str:
        users = f'authorization {{ users: [ {{ user: coral, password: "{secret}" }} ] }}\n'
        return tls_lines(server, authority, tmp_path) + users

    server.configure(configured(first, "before"))
    server.start()
    settings = replace(
        settings_for(server.url.replace("nats:", "tls:")),
        ca_file=str(ca), certificate_file=str(certificate), key_file=str(key),
        user="coral", password_file=str(password),
    )  # fmt: skip
    one, two = (Scripted.make("a", name, [""] * 7) for name in ("one", "two"))
    try:
        with capture_logs() as lines:
            async with Publisher(settings) as publisher:
                publisher.put(next(one.deliveries(0)))
                await publisher.stored()
                server.kill()
                server.configure(configured(second, "after"))
                server.start()
                publisher.put(next(two.deliveries(0)))
                await until(lambda: told(lines, "its certificate is not trusted ("))
                second.write(ca, first)
                await until(lambda: told(lines, "it does not accept the user of bus.user"))
                put(password, b"after", 0o600)
                await publisher.stored()
                assert publisher.counts.published == 2
        other = replace(settings, certificate_file="", key_file="")
        await is_told(other, "it wants a certificate: give bus.certificate_file and bus.key_file")
        stranger, its_key = second.sign("colony").write(tmp_path, "stranger")
        other = replace(settings, certificate_file=str(stranger), key_file=str(its_key))
        await is_told(other, "it does not accept the certificate of bus.certificate_file")
        await is_told(replace(settings, user="", password_file=""), "it wants a user: give one of")
    finally:
        server.kill()


async def test_secrets_are_not_sent_to_a_server_that_does_not_speak_tls(tmp_path: Path) -> None:
    with nats_server(tmp_path / "nats") as server:
        await is_told(settings_for(server.url.replace("nats:", "tls:")), "it does not speak TLS")


async def opens(settings: BusSettings) -> None:
    connection = Connection(settings, "test")
    await connection.open()
    await connection.close()


async def test_a_token_or_the_seed_of_an_nkey_says_who_connects(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    put(secret, b"a-token\n", 0o600)
    with nats_server(tmp_path / "token", more='authorization { token: "a-token" }\n') as server:
        await opens(settings_for(server.url, token_file=str(secret)))
        await is_told(settings_for(server.url), "it wants a user")
    pair = Nkey("U")
    put(secret, pair.seed, 0o600)
    more = f"authorization {{ users: [ {{ nkey: {pair.public} }} ] }}\n"
    with nats_server(tmp_path / "nkey", more=more) as server:
        await opens(settings_for(server.url, nkey_file=str(secret)))
        put(secret, Nkey("U").seed, 0o600)
        settings = settings_for(server.url, nkey_file=str(secret))
        await is_told(settings, "it does not accept the user of bus.nkey_file")


class Nkey:
    """A pair of keys of a KIND: O of operators, A of accounts, U of users."""

    def __init__(self, kind: str) -> None:
        prefix = {"O": 14 << 3, "A": 0, "U": 20 << 3}[kind]
        raw = bytes(SigningKey.generate())
        self.seed = nkeys.encode_seed(raw, prefix)
        self._pair = nkeys.from_seed(bytearray(self.seed))
        self.public = self._pair.public_key.decode()

    def token(self, about: Nkey, kind: str, **claims: object) -> str:
        """A JWT of NATS about ABOUT, signed by this."""
        claims = {
            "jti": about.public, "iat": int(time.time()) - 60, "iss": self.public, "name": kind,
            "sub": about.public,
            **{name: value for name, value in claims.items() if name == "exp"},
            "nats": {
                "type": kind, "version": 2,
                **{name: value for name, value in claims.items() if name != "exp"},
            },
        }  # fmt: skip
        head = {"typ": "JWT", "alg": "ed25519-nkey"}
        signed = ".".join(_base64(json.dumps(part).encode()) for part in (head, claims))
        return f"{signed}.{_base64(self._pair.sign(signed.encode()))}"


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


async def test_a_user_that_expires_is_followed_by_the_one_in_its_file(tmp_path: Path) -> None:
    operator, account, system, user = (Nkey(kind) for kind in "OAAU")
    path = tmp_path / "user.creds"
    limits = {
        **dict.fromkeys(("subs", "conn", "leaf", "data", "payload", "imports", "exports"), -1),
        **dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1),
        "wildcards": True,
    }
    accounts = {
        account.public: operator.token(account, "account", limits=limits),
        system.public: operator.token(system, "account", limits={"conn": -1, "subs": -1}),
    }
    preload = ", ".join(f"{key}: {token}" for key, token in accounts.items())
    operators = operator.token(operator, "operator", system_account=system.public)
    more = f"operator: {operators}\nresolver: MEMORY\nresolver_preload: {{ {preload} }}\n"
    more += f"system_account: {system.public}\n"

    def write(**claims: object) -> None:
        token = account.token(user, "user", subs=-1, data=-1, payload=-1, **claims)
        text = f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
        text += f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n"
        put(path, f"{text}------END USER NKEY SEED------\n".encode(), 0o600)

    with nats_server(tmp_path / "nats", more=more) as server, capture_logs() as lines:
        write(exp=int(time.time()) + 3)
        settings = settings_for(server.url, credentials_file=str(path))
        one, two = (Scripted.make("a", name, [""] * 7) for name in ("one", "two"))
        async with Publisher(settings) as publisher:
            publisher.put(next(one.deliveries(0)))
            await publisher.stored()
            await until(lambda: told(lines, "bus.credentials_file"))
            write()
            publisher.put(next(two.deliveries(0)))
            await publisher.stored()
            assert publisher.counts.published == 2


@contextmanager
def refused(words: str) -> Iterator[None]:
    with pytest.raises(BusError, match=words):
        yield


async def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for key in ("password_file", "token_file", "nkey_file", "credentials_file", "ca_file"):
        with refused(rf"bus.{key}: .*/file: No such file"):
            await opens(settings_for("nats://127.0.0.1:1", **{key: str(path)}))
    put(path, b"nothing of the kind", 0o644)
    for key in ("password_file", "token_file", "nkey_file", "credentials_file"):
        with refused(rf"bus.{key}: .*/file: others than its owner may read or write it"):
            await opens(settings_for("nats://127.0.0.1:1", **{key: str(path)}))
    put(path, b"nothing of the kind", 0o600)
    for key, why in (
        ("nkey_file", "it has no seed of an nkey"),
        ("credentials_file", "it has no NATS USER JWT, as `nsc` writes it"),
        ("ca_file", "no certificate in PEM"),
    ):
        with refused(rf"bus.{key}: .*/file: {why}"):
            await opens(settings_for("nats://127.0.0.1:1", **{key: str(path)}))
