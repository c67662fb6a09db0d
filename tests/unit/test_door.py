"""Two teams of a cluster, over gRPC and with a real HTTPS server that speaks Kubernetes' reviews:
each traces what lies in its own namespace. Collectors are scripted; their targets say where they
lie, as those of pods do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from coral.agent.access.access import Access
from coral.agent.access.kubernetes import Reviews
from coral.agent.access.kubernetes_api import ApiServer
from coral.agent.access.target import Ownership, Target
from coral.agent.access.tokens import Tokens
from coral.agent.caller import Caller
from coral.agent.config import Auth, Config, Limits
from coral.agent.config_access import Kubernetes
from coral.agent.serving.calls import handlers
from coral.agent.serving.door import Door
from coral.agent.serving.service import SERVICE, EbpfService
from coral.agent.sessions.admission import Admitted
from coral.agent.sessions.session import StartRequest
from coral.agent.sessions.supervisor import Supervisor
from coral.collectors.contract import Collector, ServiceProcesses, Watched
from coral.collectors.runner import in_thread
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.kubernetes_api import AUDIENCE, Cluster, running_cluster
from tests.scripted import STATS, Scripted

DENIED, UNKNOWN = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND
VERBS = ("create", "get", "list", "delete")


class Team:
    """The service account `tracer` of a namespace, on a channel to the agent."""

    def __init__(self, namespace: str, channel: grpc.aio.Channel) -> None:
        self.token, self.account = namespace, f"system:serviceaccount:{namespace}:tracer"
        self._channel = channel

    async def call(self, method: str, request: Any) -> Any:
        types: Any = SERVICE.methods_by_name[method]
        call: Any = self._channel.unary_unary(
            f"/{SERVICE.full_name}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=getattr(pb, types.output_type.name).FromString,
        )
        metadata = (("authorization", f"Bearer {self.token}"),)
        return await call(request, metadata=metadata, timeout=60)

    async def start(self, *namespaces: str) -> str:
        request = pb.StartEbpfCollectorRequest(kind=STATS, service_name=",".join(namespaces))
        answer = await self.call("StartCollector", request)
        return str(answer.collector_id)

    async def listed(self) -> list[str]:
        answer = await self.call("ListCollectors", pb.ListCollectorsRequest())
        return [each.collector_id for each in answer.collectors]

    async def refusal(self, method: str, request: Any) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as refused:
            await self.call(method, request)
        error: Any = refused.value
        return error.code(), error.details()


@asynccontextmanager
async def agent(cluster: Cluster, directory: Path) -> AsyncIterator[grpc.aio.Channel]:
    api = Kubernetes(
        server=cluster.url, ca_file=str(cluster.ca), token_file=str(cluster.token_file)
    )
    limits = Limits(concurrent_collectors=4)
    config = Config(auth=Auth(kubernetes=api), limits=limits)
    reviews = Reviews(ApiServer(api).post, AUDIENCE)
    async with Supervisor(config, Access(config, reviews)) as supervisor:
        admission: Any = supervisor._admission

        async def create(_type: type[Collector], request: StartRequest, caller: Caller) -> Admitted:
            made = Scripted()
            namespaces = tuple(filter(None, request.service_name.split(",")))
            service = ServiceProcesses(request.service_name, (2**22,), namespaces=namespaces)
            target = Target(made.kind, Watched(tgids=(2**22,)), service, False, namespaces)
            verdict = await in_thread(lambda: admission._decide(caller, target))
            ownership = Ownership(caller.identity.principal, namespaces=namespaces)
            return Admitted(made, target, ownership, verdict)

        admission.create = create
        door = Door(supervisor, Tokens(config.auth), reviews, lambda: 0.0)
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((handlers(SERVICE, EbpfService(supervisor), door=door),))
        address = f"unix:{directory}/agent.sock"
        server.add_insecure_port(address)
        await server.start()
        try:
            async with grpc.aio.insecure_channel(address) as channel:
                yield channel
        finally:
            await server.stop(None)


def admit(cluster: Cluster, team: Team, *namespaces: str) -> None:
    """A RoleBinding for the team in each namespace."""
    cluster.users[team.token] = (team.account, ("system:serviceaccounts",), AUDIENCE)
    cluster.rights |= {(team.account, verb, name) for verb in VERBS for name in namespaces}


async def test_two_teams_trace_their_own_namespaces_and_no_others(tmp_path: Path) -> None:
    with running_cluster(tmp_path / "cluster") as cluster:
        async with agent(cluster, tmp_path) as channel:
            shop, bank = Team("shop", channel), Team("bank", channel)
            admit(cluster, shop, "shop", "shop-test")
            admit(cluster, bank, "bank")
            ours = [await shop.start("shop"), await shop.start("shop", "shop-test")]
            theirs = await bank.start("bank")
            assert await shop.listed() == ours
            assert await bank.listed() == [theirs]
            await _is_refused(shop, ("bank",), "in the namespace bank")
            await _is_refused(shop, ("shop", "bank"), "in the namespace bank")
            await _is_refused(bank, ("shop",), "in the namespace shop")
            await _is_refused(shop, (), "in every namespace, since the target lies in none that")
            stop = pb.StopEbpfCollectorRequest(collector_id=theirs)
            assert await shop.refusal("StopCollector", stop) == (
                UNKNOWN, f"collector_id: this agent knows no collector {theirs!r}",
            )  # fmt: skip
            await bank.call("StopCollector", stop)
            assert await bank.listed() == []
            assert await shop.listed() == ours
            # One question for each right that was needed, however often.
            wanted = [
                (spec["user"], spec["resourceAttributes"]["verb"],
                 spec["resourceAttributes"]["namespace"])
                for kind, spec in cluster.asked if kind == "SubjectAccessReview"
            ]  # fmt: skip
            assert len(wanted) == len(set(wanted))
            assert cluster.questions("TokenReview") == 2


async def _is_refused(team: Team, namespaces: Sequence[str], where: str) -> None:
    request = pb.StartEbpfCollectorRequest(kind=STATS, service_name=",".join(namespaces))
    code, text = await team.refusal("StartCollector", request)
    assert code is DENIED
    assert text.startswith(f"StartCollector needs the right to create collectors.coral.io {where}")
    assert text.endswith(f"which Kubernetes does not give {team.account}")


async def test_a_token_of_another_audience_and_a_silent_server_let_nobody_in(
    tmp_path: Path,
) -> None:
    listing = pb.ListCollectorsRequest()
    with running_cluster(tmp_path / "cluster") as cluster:
        async with agent(cluster, tmp_path) as channel:
            team = Team("shop", channel)
            cluster.users[team.token] = (team.account, (), "https://kubernetes.default.svc")
            code, text = await team.refusal("ListCollectors", listing)
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert text.startswith("authorization: the token is wrong; ")
            cluster.broken = "silent"
            code, text = await Team("new", channel).refusal("ListCollectors", listing)
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "timed out" in text


async def test_one_peer_cannot_keep_the_api_server_busy_with_unknown_tokens(
    tmp_path: Path,
) -> None:
    listing = pb.ListCollectorsRequest()
    with running_cluster(tmp_path / "cluster") as cluster:
        async with agent(cluster, tmp_path) as channel:
            team = Team("shop", channel)
            admit(cluster, team, "shop")
            assert await team.listed() == []
            for number in range(20):
                code, _ = await Team(f"unknown-{number}", channel).refusal(
                    "ListCollectors", listing
                )
                assert code is grpc.StatusCode.UNAUTHENTICATED
            code, text = await Team("one-more", channel).refusal("ListCollectors", listing)
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "more unknown tokens than Kubernetes is asked about, 10 a second" in text
            assert cluster.questions("TokenReview") == 21
            assert await team.listed() == []  # what is known is not asked about
