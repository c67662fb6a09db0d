"""Where agents are found: files that change, names in DNS, EndpointSlices that come and go."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import dns.asyncresolver
import dns.message
import dns.rrset
import pytest

from coral.colony.follow.discovery.dns import Named
from coral.colony.follow.discovery.http_json import HttpError, Server
from coral.colony.follow.discovery.kubernetes import Endpoints, addresses_of
from coral.colony.follow.discovery.listed import Listed, Watched, parsed
from coral.colony.follow.discovery.source import Source
from tests.certificates import put
from tests.colony import until
from tests.kubernetes_api import authority
from tests.pods import ApiServer

PATH: Final = "/apis/discovery.k8s.io/v1/namespaces/coral/endpointslices"


@asynccontextmanager
async def found_by(source: Source) -> AsyncIterator[list[set[str]]]:
    """What SOURCE has found so far, each time."""
    told: list[set[str]] = []
    task = asyncio.create_task(source.follow(lambda addresses: told.append(set(addresses))))
    try:
        yield told
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_list_is_found_once() -> None:
    async with found_by(Listed(["a:1", "b:2"])) as told:
        await until(lambda: told == [{"a:1", "b:2"}])


async def test_a_file_is_read_again_when_it_is_replaced_and_kept_while_it_is_broken(
    tmp_path: Path,
) -> None:
    path = tmp_path / "agents"
    async with found_by(Watched(path)) as told:
        put(path, b"# two of them\none:9001\n\n two:9001  # the second\n")
        await until(lambda: told == [{"one:9001", "two:9001"}])
        put(path, b"one:9001\nnowhere\n")
        put(path, b"three:9001\n")
        await until(lambda: told[1:] == [{"three:9001"}])
        put(path, b"")
        await until(lambda: told[2:] == [set()])


def test_a_line_that_is_no_address_is_named() -> None:
    with pytest.raises(ValueError, match=r"^line 2: 'nowhere' is not accepted; give HOST:PORT"):
        parsed(b"one:9001\nnowhere\n")


async def test_a_name_is_all_its_addresses() -> None:
    async with found_by(Named("localhost:9001", 60)) as told:
        await until(lambda: told)
    assert "127.0.0.1:9001" in told[0]
    assert told[0] <= {"127.0.0.1:9001", "[::1]:9001"}


async def test_an_address_that_a_name_has_no_more_goes_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = ["127.0.0.1", "127.0.0.2"]

    async def getaddrinfo(_host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        if not answers:
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return [(0, 0, 0, "", (address, port)) for address in answers]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    async with found_by(Named("agents:1", 0.01, gone_after_s=0.3)) as told:
        await until(lambda: told == [{"127.0.0.1:1", "127.0.0.2:1"}])
        answers.clear()  # no answer is no news
        await asyncio.sleep(0.05)
        answers.append("127.0.0.1")
        await until(lambda: told[1:] == [{"127.0.0.1:1"}])


@pytest.mark.parametrize("name", ["a..b:1", f"{'x' * 64}:1", ".:1"])
async def test_a_name_that_can_be_none_is_nothing_found(name: str) -> None:
    async with found_by(Named(name, 60)) as told:
        await until(lambda: told == [set()])


async def test_a_name_without_an_answer_is_nothing_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*_: object, **__: object) -> list[tuple[Any, ...]]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    async with found_by(Named("agents:1", 0.01)) as told:
        await until(lambda: told == [set()])


class _Names(asyncio.DatagramProtocol):
    """A DNS server that knows one name."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, peer: Any) -> None:
        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        (question,) = query.question
        texts = ["0 0 9001 localhost.", "0 0 9002 localhost."]
        answer.answer.append(dns.rrset.from_text(question.name, 60, "IN", "SRV", *texts))
        self._transport.sendto(answer.to_wire(), peer)


async def test_an_srv_record_names_hosts_and_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        _Names, ("127.0.0.1", 0)
    )
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers = ["127.0.0.1"]
    resolver.port = transport.get_extra_info("sockname")[1]
    monkeypatch.setattr(dns.asyncresolver, "default_resolver", resolver)
    try:
        async with found_by(Named("_grpc._tcp.agents.coral", 60)) as told:
            await until(lambda: told)
    finally:
        transport.close()
    assert {"127.0.0.1:9001", "127.0.0.1:9002"} <= told[0]


def endpoints(name: str, *addresses: str, version: int = 1, **port: object) -> dict[str, Any]:
    """An EndpointSlice in the form of the API (discovery.k8s.io/v1)."""
    return {
        "metadata": {"name": name, "resourceVersion": str(version)},
        "ports": [{"name": "metrics", "port": 9464}, {"name": "grpc", "port": 9001, **port}],
        "endpoints": [
            {"addresses": [address], "conditions": {"ready": False}} for address in addresses
        ],
    }


async def test_endpoints_are_listed_with_a_token_and_then_watched(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    certificate, key = authority(tmp_path)
    with ApiServer((certificate, key)) as api:
        api.items = [endpoints("a", "10.0.0.1", "10.0.0.2"), endpoints("b", "fd00::3")]
        server = Server(api.url, str(token), str(certificate))
        async with found_by(Endpoints(server, "coral", "agents", "grpc")) as told:
            await until(lambda: told == [{"10.0.0.1:9001", "10.0.0.2:9001", "[fd00::3]:9001"}])
            api.events.append({"type": "MODIFIED", "object": endpoints("a", "10.0.0.2")})
            await until(lambda: told[-1] == {"10.0.0.2:9001", "[fd00::3]:9001"})
            api.events.append({"type": "DELETED", "object": endpoints("b")})
            await until(lambda: told[-1] == {"10.0.0.2:9001"})
            api.items = [endpoints("c", "10.0.0.9")]
            gone = {"code": 410, "message": "too old resource version"}
            api.events.append({"type": "ERROR", "object": gone})
            await until(lambda: told[-1] == {"10.0.0.9:9001"})
    assert set(api.tokens) == {"Bearer secret"}
    assert {request.partition("?")[0] for request in api.requests} == {PATH}
    assert all(
        "labelSelector=kubernetes.io%2Fservice-name%3Dagents" in request for request in api.requests
    )
    assert "resourceVersion=7" in api.requests[1]


@pytest.mark.parametrize(
    ("port", "slice_", "addresses"),
    [
        ("grpc", endpoints("a", "10.0.0.1"), {"10.0.0.1:9001"}),
        ("9001", endpoints("a", "10.0.0.1"), {"10.0.0.1:9001"}),
        ("9777", endpoints("a", "10.0.0.1"), {"10.0.0.1:9777"}),
        ("other", endpoints("a", "10.0.0.1"), set()),
        ("grpc", endpoints("a", "10.0.0.1", port=None), set()),
        ("grpc", {"metadata": {}, "ports": None, "endpoints": None}, set()),
        ("grpc", {**endpoints("a"), "endpoints": [{}, {"addresses": []}]}, set()),
    ],
)
def test_a_slice_has_the_port_of_that_name_or_number(
    port: str, slice_: Mapping[str, Any], addresses: set[str]
) -> None:
    assert addresses_of(slice_, port) == addresses


async def test_a_server_that_cannot_be_used_is_an_error_with_its_address(tmp_path: Path) -> None:
    certificate, key = authority(tmp_path)
    with ApiServer((certificate, key)) as api, pytest.raises(HttpError, match=api.url):
        await Server(api.url).get("/")  # which no authority of this machine has signed
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(HttpError, match=f"http://127.0.0.1:{port}: "):
        await Server(f"http://127.0.0.1:{port}").get("/")


async def test_no_token_goes_to_whoever_has_taken_a_port_without_tls(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    with ApiServer() as api:
        await Server(api.url, str(token)).get(PATH)
    assert api.tokens == [""]
