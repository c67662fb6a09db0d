"""TLS as clients meet it: a real agent whose certificates and authorities change under its streams,
clients that it refuses and that refuse it, and what each of them is told."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from coral.client import AgentClient, ConnectionLostError, Tls, TlsError
from tests.certificates import Authority, Pair, distinguished, put
from tests.events import Received, eventually, info_of, receive, start_events
from tests.http2 import PREFACE, SETTINGS, frame
from tests.support import (
    INSECURE,
    PATIENCE,
    Puppet,
    RunningAgent,
    coral,
    running_agent,
    sample,
    samples,
    scrape,
    wait_until,
)

STREAMS: Final = 6
CALLS: Final = 20  # a rotation
COLONY: Final = "spiffe://cluster.local/ns/shop/sa/colony"

pytestmark = pytest.mark.usefixtures("nothing_left")


@dataclass
class House:
    """An agent over TLS, and what its files are made from."""

    agent: RunningAgent
    address: str
    directory: Path
    authority: Authority

    def client(self, name: str, pair: Pair) -> Tls:
        """What a client with PAIR, in files called NAME, knows."""
        certificate, key = pair.write(self.directory, name)
        return Tls(str(self.directory / "agents.crt"), str(certificate), str(key))

    def rotate(self, pair: Pair) -> None:
        """Replaces the agent's certificate, and its key after that."""
        pair.write(self.directory, "server")

    def shown(self) -> int:
        """The serial number of the certificate that a new connection is shown."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.directory / "agents.crt")
        host, _, port = self.address.rpartition(":")
        with (
            socket.create_connection((host, int(port)), 10 * PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            found: Any = secure.getpeercert()
        return int(found["serialNumber"], 16)


@contextmanager
def house(directory: Path, **tls: str) -> Iterator[House]:
    """An agent on a unix socket, which is its address, and on TCP."""
    authority = Authority("agents and clients")
    authority.write(directory / "agents.crt")
    authority.write(directory / "clients.crt")
    certificate, key = authority.sign("localhost", "127.0.0.1").write(directory, "server")
    unix = f"unix:{directory}/agent.sock"
    config = {
        "listen": [unix, "127.0.0.1:0"],
        "tls": {
            "certificate": str(certificate),
            "key": str(key),
            "client_ca": str(directory / "clients.crt"),
            **tls,
        },
        "limits": {"cpu_percent": 1000, "subscriber_bytes_per_second": "1GiB"},
    }
    with running_agent(directory / "agent", config) as agent:
        (line,) = [line for line in agent.log() if line["event"] == "listening"]
        agent.address = unix
        address: str = line["grpc"][1]  # type: ignore[index]
        yield House(agent, address, directory, authority)


def closed_for(agent: RunningAgent, reason: str) -> float:
    """How many TCP connections the agent has closed for REASON."""
    name = "coral_agent_connections_closed_total"
    (count,) = samples(scrape(agent), name, listener="tcp", reason=reason).values()
    return count


@pytest.mark.kernel
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rotations", [15, pytest.param(100, marks=pytest.mark.soak)])
async def test_rotations_lose_no_stream_and_each_is_seen(rotations: int, tmp_path: Path) -> None:
    with house(tmp_path) as at, Puppet() as puppet:
        tls = at.client("colony", at.authority.sign(COLONY))
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(AgentClient(at.address, tls=tls))
                for _ in range(STREAMS)
            ]
            collector = await start_events(clients[0], puppet.pid, include="getppid")
            reading = [asyncio.create_task(receive(client, collector)) for client in clients]

            async def subscribed() -> list[str]:
                info = await info_of(clients[0], collector)
                peers = [one.peer for one in info.subscribers]
                return peers if len(peers) == STREAMS else []

            peers = await eventually(subscribed)
            assert all(peer.endswith(f", {COLONY}") for peer in peers)
            for _ in range(rotations):
                pair = at.authority.sign("localhost", "127.0.0.1")
                at.rotate(pair)
                puppet.getppid(CALLS)

                async def is_shown(serial: int = pair.serial) -> bool:
                    return await asyncio.to_thread(at.shown) == serial

                await eventually(is_shown)
            # The streams stand: they are those that have subscribed in the beginning.
            assert await subscribed() == peers
            await clients[0].stop(collector)
            streams: list[Received] = await asyncio.gather(*reading)
        for stream in streams:
            assert list(stream.seqs) == list(range(1, rotations * CALLS + 1))
            assert not stream.lost
        reloads = sample(at.agent, "coral_tls_reloads_total", listener="grpc")
        # A key that came after its certificate may have been too late for a look between them.
        failures = sample(at.agent, "coral_tls_reload_failures_total", listener="grpc")
        assert reloads == rotations
        assert failures <= rotations
        assert closed_for(at.agent, "certificate") == 0


@pytest.mark.kernel
async def test_a_removed_authority_ends_its_streams_which_resume_by_another(
    tmp_path: Path,
) -> None:
    old, new = Authority("old"), Authority("new")
    with house(tmp_path) as at, Puppet() as puppet:
        bundle = tmp_path / "clients.crt"
        old.write(bundle, new)
        trusted = at.client("new", new.sign(subject=distinguished(O="shop", CN="new")))
        leaving = at.client("old", old.sign(subject=distinguished(O="shop", CN="old")))
        await eventually(lambda: accepts(at, leaving))
        async with (
            AgentClient(at.address, tls=trusted) as stays,
            AgentClient(at.address, tls=leaving) as moves,
        ):
            collector = await start_events(stays, puppet.pid, include="getppid")
            async with (
                stays.subscribe(collector) as first,
                moves.subscribe(collector) as second,
            ):
                info = await info_of(stays, collector)
                names = {one.peer.partition(", ")[2] for one in info.subscribers}
                assert names == {"subject:CN=new,O=shop", "subject:CN=old,O=shop"}
                puppet.getppid(CALLS)
                reading = [asyncio.create_task(to_end(each)) for each in (first, second)]
                refusals = closed_for(at.agent, "tls")
                new.write(bundle)
                await eventually(lambda: closed(at.agent, "certificate"))
                puppet.getppid(CALLS)  # while the second is away
                # It is refused, until its files have a certificate of the other authority.
                await eventually(lambda: closed(at.agent, "tls", refusals + 1))
                at.client("old", new.sign(subject=distinguished(CN="renewed")))

                async def has_resumed() -> bool:
                    info = await info_of(stays, collector)
                    return any("CN=renewed" in one.peer for one in info.subscribers)

                await eventually(has_resumed, 30 * PATIENCE)
                puppet.getppid(CALLS)
                await stays.stop(collector)
                assert await asyncio.gather(*reading) == [3 * CALLS] * 2
                assert (first.reconnects, second.reconnects) == (0, 1)
                assert not first.account.lost
                assert not second.account.lost


async def test_a_revoked_client_loses_its_connection_and_gets_no_other(tmp_path: Path) -> None:
    revoked_at = tmp_path / "clients.crl"
    put(revoked_at, Authority("agents and clients").revoke())  # of another key: it counts for none
    with house(tmp_path, client_crl=str(revoked_at)) as at:
        leaving, staying = (at.authority.sign(subject=distinguished(CN=n)) for n in "ab")
        left, stays = at.client("left", leaving), at.client("stays", staying)
        assert not await accepts(at, stays)  # its authority has no list
        put(revoked_at, at.authority.revoke())
        await eventually(lambda: accepts(at, stays))
        async with (
            AgentClient(at.address, tls=left) as first,
            AgentClient(at.address, tls=stays) as second,
        ):
            await first.collectors()
            await second.collectors()
            put(revoked_at, at.authority.revoke(leaving))
            await eventually(lambda: closed(at.agent, "certificate"))
            await second.collectors()
            told = await refused(at.address, left)
            assert told.endswith("this client's certificate: the certificate was revoked"), told
        expiry = sample(
            at.agent, "coral_tls_certificate_expiry_timestamp_seconds", file="client_crl"
        )
        assert expiry > time.time()
        assert closed_for(at.agent, "certificate") == 1
        (closing,) = (it for it in at.agent.log() if it.get("code") == "certificate")
        assert closing["reason"] == "its certificate was revoked"


@pytest.mark.kernel
async def test_a_client_follows_its_files_and_keeps_the_streams_that_it_has(
    tmp_path: Path,
) -> None:
    with house(tmp_path) as at, Puppet() as puppet:
        tls = at.client("mine", at.authority.sign(subject=distinguished(CN="first")))
        async with AgentClient(at.address, tls=tls) as client:
            collector = await start_events(client, puppet.pid, include="getppid")

            async def names() -> set[str]:
                info = await info_of(client, collector)
                return {one.peer.partition(", ")[2] for one in info.subscribers}

            async with client.subscribe(collector) as first:
                assert await names() == {"subject:CN=first"}
                put(tmp_path / "mine.key", b"half of a change", 0o600)
                assert await names() == {"subject:CN=first"}  # a call with what it had
                at.client("mine", at.authority.sign(subject=distinguished(CN="second")))
                async with client.subscribe(collector) as second:
                    assert await names() == {"subject:CN=first", "subject:CN=second"}
                    assert len(client._channels._calls) == 2
                    puppet.getppid(CALLS)
                    reading = [asyncio.create_task(to_end(each)) for each in (first, second)]
                    await client.stop(collector)
                    assert await asyncio.gather(*reading) == [CALLS] * 2
                assert (first.reconnects, second.reconnects) == (0, 0)

            async def is_closed() -> bool:
                return len(client._channels._calls) == 1

            await eventually(is_closed)  # the old channel has gone with its last stream


def needs_tls(at: House) -> str:
    return (
        f"the agent at {at.address} does not answer: it speaks TLS: give --tls-ca, or CORAL_TLS_CA"
    )


async def to_end(stream: Any) -> int:
    return sum([len(batch.events) async for batch in stream])


async def closed(agent: RunningAgent, reason: str, times: float = 1) -> bool:
    return await asyncio.to_thread(closed_for, agent, reason) >= times


async def accepts(at: House, tls: Tls) -> bool:
    try:
        async with AgentClient(at.address, tls=tls) as client:
            await client.collectors()
    except (TlsError, ConnectionLostError):
        return False
    return True


async def refused(address: str, tls: Tls | None) -> str:
    """What a client is told that cannot connect."""
    with pytest.raises(TlsError) as error:
        async with AgentClient(address, tls=tls) as client:
            await client.collectors()
    return str(error.value)


async def test_both_sides_refuse_what_they_do_not_trust_and_say_why(tmp_path: Path) -> None:
    with house(tmp_path) as at:
        good = at.client("good", at.authority.sign(COLONY))
        assert await accepts(at, good)
        of_client = f"no connection to {at.address}: it does not accept"
        cases = {
            "a wrong authority": (Authority("other").sign(COLONY), "no authority that the agent"),
            "expired": (at.authority.sign(COLONY, days=-1), "the certificate has expired"),
        }
        for pair, why in cases.values():
            told = await refused(at.address, at.client("bad", pair))
            assert told.startswith(f"{of_client} this client's certificate: {why}"), told
        without = Tls(good.ca)
        told = await refused(at.address, without)
        assert told.startswith(f"{of_client} a client without a certificate: it wants a"), told
        stranger = Authority("stranger").write(tmp_path / "stranger.crt")
        told = await refused(at.address, Tls(str(stranger), good.certificate, good.key))
        assert "its certificate is not trusted (self" in told, told
        told = await refused(at.address, Tls(good.ca, good.certificate, good.key, "other.example"))
        assert "its certificate is for another name than other.example" in told, told
        told = await refused(at.address, None)
        assert told == needs_tls(at)
        # With the name that is in the certificate, an address may be any.
        named = Tls(good.ca, good.certificate, good.key, "localhost")
        assert await accepts(at, named)
        reasons = [
            line.get("reason") for line in at.agent.log() if line["event"] == "connection closed"
        ]
        assert {
            "unable to get local issuer certificate", "certificate has expired",
            "peer did not return a certificate", "this address needs TLS",
        } <= set(reasons)  # fmt: skip


async def test_a_client_with_tls_is_told_that_an_address_has_none(tmp_path: Path) -> None:
    authority = Authority().write(tmp_path / "ca.crt")
    with running_agent(tmp_path / "a", {"auth": INSECURE}, "--listen", "127.0.0.1:0") as agent:
        (line,) = [line for line in agent.log() if line["event"] == "listening"]
        address: str = line["grpc"][0]  # type: ignore[index]
        told = await refused(address, Tls(str(authority)))
        assert told == (
            f"no connection to {address}: it ended the handshake of TLS: does it speak TLS on "
            "this address?"
        )


def test_the_command_line_takes_files_and_says_what_is_wrong_with_them(tmp_path: Path) -> None:
    with house(tmp_path) as at:
        tls = at.client("person", at.authority.sign(subject=distinguished(CN="ann")))
        files = ("--tls-ca", tls.ca, "--tls-cert", tls.certificate, "--tls-key", tls.key)
        command = coral("collectors", "--agent", at.address)

        def said(*options: str) -> tuple[int, str]:
            ran = subprocess.run(
                [*command, *options], capture_output=True, text=True, timeout=60, check=False
            )
            return ran.returncode, ran.stderr

        assert said(*files) == (0, "")
        assert said(*files, "--tls-server-name", "localhost")[0] == 0
        assert said() == (1, f"coral: {needs_tls(at)}\n")
        assert said("--tls-ca", "/none") == (
            2, "coral: --tls-ca: /none: No such file or directory\n",
        )  # fmt: skip
        assert "give both" in said(*files[:4])[1]
        put(tmp_path / "person.key", Authority().sign("x").key_pem, 0o600)
        status, text = said(*files)
        assert (status, "key values mismatch" in text) == (2, True), text


def test_clients_need_no_certificate_where_it_is_only_asked_for(tmp_path: Path) -> None:
    token = tmp_path / "token"
    put(token, b"0123456789abcdef", 0o600)
    authority = Authority()
    ca = str(authority.write(tmp_path / "ca.crt"))
    certificate, key = authority.sign("127.0.0.1").write(tmp_path, "server")
    tls = {"certificate": str(certificate), "key": str(key), "client_ca": ca}
    config = {
        "tls": {**tls, "client_certificates": "request"},
        "auth": {"token_file": str(token)},
        "listen": ["127.0.0.1:0"],
    }

    async def call() -> None:
        async with AgentClient(address, "0123456789abcdef", tls=Tls(ca)) as client:
            await client.collectors()

    with running_agent(tmp_path / "agent", config) as agent:
        (line,) = [line for line in agent.log() if line["event"] == "listening"]
        address: str = line["grpc"][0]  # type: ignore[index]
        asyncio.run(call())


def test_handshakes_that_do_not_go_on_are_closed_in_time(tmp_path: Path) -> None:
    """Silent ones, those that stop in the middle, and those that say nothing after it."""
    authority = Authority()
    ca = authority.write(tmp_path / "ca.crt")
    certificate, key = authority.sign("127.0.0.1").write(tmp_path, "server")
    config = {
        "tls": {"certificate": str(certificate), "key": str(key), "client_ca": str(ca)},
        "listen": ["127.0.0.1:0"],
        "limits": {"connection_handshake": "500ms"},
    }
    with running_agent(tmp_path / "agent", config) as agent:
        (line,) = [line for line in agent.log() if line["event"] == "listening"]
        host, _, port = str(line["grpc"][0]).rpartition(":")  # type: ignore[index]
        for sent in (b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"):
            with socket.create_connection((host, int(port)), 10 * PATIENCE) as client:
                client.sendall(sent)
                assert client.recv(1) == b""
        wait_until(lambda: closed_for(agent, "handshake") == 2)


def test_nothing_is_resumed_so_that_each_connection_is_verified(tmp_path: Path) -> None:
    with house(tmp_path) as at:
        certificate, key = at.authority.sign(COLONY).write(tmp_path, "client")
        host, _, port = at.address.rpartition(":")
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(tmp_path / "agents.crt")
            context.load_cert_chain(certificate, key)
            context.set_alpn_protocols(["h2"])
            context.minimum_version = context.maximum_version = version
            with (
                socket.create_connection((host, int(port)), 10 * PATIENCE) as plain,
                context.wrap_socket(plain, server_hostname=host) as secure,
            ):
                assert secure.selected_alpn_protocol() == "h2"
                secure.sendall(PREFACE + frame(SETTINGS))
                assert secure.recv(9)
                session = secure.session
                assert session is None or not session.has_ticket


def test_old_versions_are_refused(tmp_path: Path) -> None:
    with house(tmp_path) as at:
        host, _, port = at.address.rpartition(":")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        with (
            socket.create_connection((host, int(port)), 10 * PATIENCE) as plain,
            pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"),
        ):
            context.wrap_socket(plain)
