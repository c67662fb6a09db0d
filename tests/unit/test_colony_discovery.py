"""Where agents are found: files that change, names in DNS, EndpointSlices that come and go."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import dns.asyncresolver
import dns.message
import dns.rrset
import pytest
from structlog.testing import capture_logs

from coral.colony.follow.discovery.dns import Named, Seen
from coral.colony.follow.discovery.http_json import HttpError, Server
from coral.colony.follow.discovery.kubernetes import Endpoints
from coral.colony.follow.discovery.left_out import Bounded
from coral.colony.follow.discovery.listed import Listed, Watched, parsed
from coral.colony.follow.discovery.pace import Pace
from coral.colony.follow.discovery.slices import Slice, Slices, read_slice
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
    """A DNS server that answers every question with the SRV records of these TEXTS."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, peer: Any) -> None:
        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        (question,) = query.question
        answer.answer.append(dns.rrset.from_text(question.name, 60, "IN", "SRV", *self._texts))
        self._transport.sendto(answer.to_wire(), peer)


@asynccontextmanager
async def srv(monkeypatch: pytest.MonkeyPatch, *texts: str) -> AsyncIterator[list[str]]:
    """Has every name answered with the SRV records of these TEXTS, which may change."""
    said = list(texts)
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Names(said), ("127.0.0.1", 0)
    )
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers = ["127.0.0.1"]
    resolver.port = transport.get_extra_info("sockname")[1]
    monkeypatch.setattr(dns.asyncresolver, "default_resolver", resolver)
    try:
        yield said
    finally:
        transport.close()


async def test_an_srv_record_names_hosts_and_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        srv(monkeypatch, "0 0 9001 localhost.", "0 0 9002 localhost."),
        found_by(Named("_grpc._tcp.agents.coral", 60)) as told,
    ):
        await until(lambda: told)
    assert {"127.0.0.1:9001", "127.0.0.1:9002"} <= told[0]


async def test_a_target_without_an_address_is_left_out_and_hides_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts = {"one.coral": "10.0.0.1", "new.coral": "10.0.0.2"}

    async def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        if host not in hosts:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(0, 0, 0, "", (hosts[host], port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    with capture_logs() as logged:
        async with (
            srv(monkeypatch, "0 0 9001 one.coral.", "0 0 9001 gone.coral.", "0 0 1 .") as texts,
            found_by(Named("_grpc._tcp.agents.coral", 0.01)) as told,
        ):
            await until(lambda: told == [{"10.0.0.1:9001"}])
            texts.append("0 0 9002 new.coral.")
            await until(lambda: told[1:] == [{"10.0.0.1:9001", "10.0.0.2:9002"}])
            assert [(line["count"], line["first"], line["reason"]) for line in logged] == [
                (2, [":1", "gone.coral:9001"], "no such name")
            ]
            hosts.clear()
            await until(lambda: logged[1:])
            assert logged[1]["event"] == "a name of agents.dns has no answer"
    assert len(told) == 2


def test_addresses_beyond_the_most_are_left_out_and_told_once() -> None:
    bounded = Bounded("agents.dns: agents:1", most=2)
    with capture_logs() as logged:
        assert bounded.of(frozenset("cd")) == {"c", "d"}
        assert bounded.of(frozenset("abcd")) == {"c", "d"}  # which are followed already
        assert bounded.of(frozenset("abd")) == {"a", "d"}
        assert [(line["source"], line["most"], line["left_out"]) for line in logged] == [
            ("agents.dns: agents:1", 2, 2)
        ]
        assert bounded.of(frozenset("ab")) == {"a", "b"}
        assert bounded.of(frozenset("abc")) == {"a", "b"}
    assert len(logged) == 2


def test_ten_thousand_addresses_of_one_source_are_followed() -> None:
    many = frozenset(f"10.0.{number >> 8}.{number & 255}:1" for number in range(10_001))
    assert len(Seen("agents:1", gone_after_s=60).after(many, 0)) == 10_000
    slices = Slices("coral/agents")
    slices.put(Slice("a", many))
    assert len(slices.addresses()) == 10_000


def test_names_that_answer_in_turns_count_up_to_the_most() -> None:
    seen = Seen("agents:1", gone_after_s=60, most=3)
    assert seen.after("ab", 0) == {"a", "b"}
    assert seen.after("cd", 15) == {"a", "b", "c"}
    assert seen.after("cd", 61) == {"c", "d"}


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
        ("grpc", {"metadata": {"name": "a"}, "ports": None, "endpoints": None}, set()),
    ],
)
def test_a_slice_has_the_port_of_that_name_or_number(
    port: str, slice_: Mapping[str, Any], addresses: set[str]
) -> None:
    assert read_slice(slice_, port) == Slice("a", frozenset(addresses))


NO_ADDRESS: Final = "an endpoint has no address"
NO_ENDPOINTS: Final[Sequence[object]] = (
    None, {}, {"addresses": []}, {"addresses": [5]}, {"addresses": [""]},
)  # fmt: skip


@pytest.mark.parametrize(
    ("item", "read"),
    [
        (None, Slice("", trouble="it is no object")),
        ([], Slice("", trouble="it is no object")),
        ({"metadata": None}, Slice("", trouble="it has no name")),
        ({"metadata": {"name": 5}}, Slice("", trouble="it has no name")),
        ({**endpoints("a"), "ports": 5}, Slice("a", trouble="its ports are no list")),
        ({**endpoints("a"), "endpoints": {}}, Slice("a", trouble="its endpoints are no list")),
        *(
            (endpoints("a", "10.0.0.1", port=port), Slice("a", trouble=trouble))
            for port in ("http", 9001.5, True, 65536, [1])
            for trouble in ["its port is no number of a port"]
        ),
        *(
            (
                {**endpoints("a"), "endpoints": [bad, {"addresses": ["10.0.0.1"]}]},
                Slice("a", frozenset({"10.0.0.1:9001"}), NO_ADDRESS),
            )
            for bad in NO_ENDPOINTS
        ),
    ],
)
def test_what_cannot_be_read_of_a_slice_is_left_out(item: object, read: Slice) -> None:
    assert read_slice(item, "grpc") == read


def test_a_slice_that_cannot_be_read_any_more_keeps_its_addresses_and_is_told_once() -> None:
    slices, bad = Slices("coral/agents"), Slice("a", trouble="its ports are no list")
    one, two = Slice("a", frozenset({"10.0.0.1:1"})), Slice("b", frozenset({"10.0.0.2:1"}))
    with capture_logs() as logged:
        slices.listed([one])
        for _ in range(2):
            slices.put(bad)
            slices.listed([Slice("", trouble="it is no object"), bad, two])
            assert slices.addresses() == one.addresses | two.addresses
        assert [(line["count"], line["first"], line["reason"]) for line in logged] == [
            (1, ["a"], "its ports are no list"),
            (1, [""], "it is no object"),
        ]
        slices.put(one)
        slices.put(bad)
        assert len(logged) == 3
    slices.drop("a")
    assert slices.addresses() == two.addresses


def test_slices_and_addresses_have_a_most() -> None:
    slices = Slices("coral/agents", most_slices=2, most_addresses=3)
    with capture_logs() as logged:
        slices.listed(Slice(name, frozenset({f"{name}:1", f"{name}:2"})) for name in "abc")
        assert slices.addresses() == {"a:1", "a:2", "b:1"}
    assert [line["event"] for line in logged] == [
        "EndpointSlices are left out",
        "a source names more agents than are followed",
    ]


def test_a_server_is_asked_ever_later_while_nothing_comes_of_it() -> None:
    pace = Pace(least_s=1, most_s=60)
    assert [pace.ended(0.1, changes=0) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert pace.is_slow
    assert [pace.ended(0.1, changes=1) for _ in range(3)] == [1, 1, 1]
    assert not pace.is_slow
    assert [pace.failed(5) for _ in range(3)] == [2, 4, 8]
    assert pace.failed(60) == 1
    assert pace.ended(300, changes=0) == 0
    assert [pace.failed(0), pace.ended(1, changes=0), pace.failed(0)] == [1, 0, 1]


def endpoints_of(api: ApiServer, pauses: list[float], most: int = 1 << 30) -> Endpoints:
    """Those that API has, to a clock that stands: what is asked for at once counts as such however
    long it takes. The PAUSES are not waited for; the one after MOST does not end."""

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) >= most:
            await asyncio.Event().wait()

    return Endpoints(
        Server(api.url), "coral", "agents", "grpc", clock=lambda: 0.0, sleep=sleep
    )  # fmt: skip


def watches(api: ApiServer) -> list[bool]:
    """Whether each request was one for a watch."""
    return ["watch=1" in request for request in api.requests]


async def test_a_server_that_ends_each_watch_at_once_is_asked_ever_later_and_told_once() -> None:
    pauses: list[float] = []
    with ApiServer() as api, capture_logs() as logged:
        api.items, api.ends_watches = [endpoints("a", "10.0.0.1")], True
        async with found_by(endpoints_of(api, pauses, most=8)) as told:
            await until(lambda: len(pauses) == 8)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert watches(api) == [False] + 8 * [True]
    assert told == [{"10.0.0.1:9001"}]
    assert [line["reason"] for line in logged] == [f"{api.url}: the server ends each watch at once"]


@pytest.mark.parametrize(("code", "reasons"), [(403, 1), (500, 1), (None, 1), (410, 0)])
async def test_a_watch_that_fails_is_asked_for_ever_later_and_told_once(
    code: int | None, reasons: int
) -> None:
    pauses: list[float] = []
    with ApiServer() as api, capture_logs() as logged:
        api.items = [endpoints("a", "10.0.0.1")]
        error = {"type": "ERROR", "object": {"code": code, "message": "no"}}
        api.first = [{"type": "MODIFIED", "object": endpoints("a", "10.0.0.2")}, error]
        async with found_by(endpoints_of(api, pauses, most=4)) as told:
            await until(lambda: len(pauses) == 4)
    assert pauses == [1, 2, 4, 8]
    assert watches(api) == 4 * [False, True]
    assert told == 4 * [{"10.0.0.1:9001"}, {"10.0.0.2:9001"}]
    assert [line["reason"] for line in logged] == [
        f"{api.url}: the watch failed: {code}: no"
    ] * reasons


async def test_what_is_malformed_in_a_list_or_a_watch_hides_nothing_else() -> None:
    bad = endpoints("bad", "10.0.0.8", port="http")
    with ApiServer() as api, capture_logs() as logged:
        api.items = [None, 5, {}, bad, endpoints("a", "10.0.0.1"), {"metadata": {"name": "b"}}]
        api.first = [b"no JSON", b"[" * 5000, b"null", {"type": 5}]
        api.first += [{"type": "MODIFIED", "object": each} for each in (None, "a", bad)]
        api.first.append({"type": "MODIFIED", "object": endpoints("a", "10.0.0.2")})
        async with found_by(endpoints_of(api, [])) as told:
            await until(lambda: {"10.0.0.2:9001"} in told)
            assert told[0] == {"10.0.0.1:9001"}
            api.items, api.first = [endpoints("c", "10.0.0.3")], []
            api.ends_watches = True  # a line was missed: they are listed again
            await until(lambda: {"10.0.0.3:9001"} in told)
            api.ends_watches = False
    lines = [line for line in logged if line["event"] != "agents.kubernetes has no answer"]
    assert [(line["event"], line["count"], line["reason"]) for line in lines] == [
        ("EndpointSlices are left out", 2, "it has no name"),
        ("lines of a watch are left out", 1, "it is no event in JSON"),
    ]


async def test_an_answer_that_is_no_list_is_none() -> None:
    pauses: list[float] = []
    with ApiServer() as api, capture_logs() as logged:
        api.items = 5  # type: ignore[assignment]
        async with found_by(endpoints_of(api, pauses, most=2)) as told:
            await until(lambda: len(pauses) == 2)
    assert told == []
    assert [line["reason"] for line in logged] == [f"{api.url}: the answer is no list"]


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
