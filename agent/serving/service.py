"""The gRPC face of the supervisor: requests in, refusals as status codes, frames out as bytes.

No logic of its own. The handlers are bound by the service's descriptor, because what streams send
is encoded already: their serialiser is the identity.
"""

from __future__ import annotations

import string
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, Never
from urllib.parse import quote

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from coral.agent.errors import (
    DeniedError,
    InvalidRequestError,
    LimitError,
    NotFoundError,
    RefusedError,
    UnsupportedError,
)
from coral.agent.sessions.session import Session, StartRequest
from coral.agent.sessions.supervisor import Supervisor
from coral.agent.streams.channel import SubscriptionEndedError, Terms
from coral.agent.streams.filter import Filter
from coral.agent.streams.frame import Frame
from coral.bpf import BpfError, Feature
from coral.bpf.libbpf import EXHAUSTED
from coral.collectors.registry import COLLECTORS
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_name

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.audit")

SERVICE: Final = pb.DESCRIPTOR.services_by_name["EbpfService"]

Context = grpc.aio.ServicerContext[Any, Any]

# Clients take 8 KiB of trailing metadata, and a status's text is percent-encoded there.
_STATUS_BYTES: Final = 4096
_SENT_AS_IT_IS: Final = string.punctuation.replace("%", "") + " "

_CODES: Final[dict[type[RefusedError], grpc.StatusCode]] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    LimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeniedError: grpc.StatusCode.PERMISSION_DENIED,
}


class EbpfService:
    """One method for each RPC of the contract, of the same name."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def StartCollector(  # noqa: N802  the RPC's name
        self, request: pb.StartEbpfCollectorRequest, context: Context
    ) -> pb.StartEbpfCollectorResponse:
        """Starts a collector; see the contract."""
        name = self._supervisor.config.name
        if request.agent_id not in ("", name):
            await _refuse(
                context,
                NotFoundError(
                    f"agent_id: {request.agent_id!r} is not here; this agent is {name!r}"
                ),
            )
        wanted = StartRequest(
            request.kind,
            request.service_name,
            dict(request.config),
            _seconds(request.duration) if request.HasField("duration") else None,
        )
        try:
            session = await self._supervisor.start(wanted)
        except UnsupportedError as error:
            return pb.StartEbpfCollectorResponse(supported=False, error=str(error))
        except (RefusedError, BpfError) as error:
            await _refuse(context, error)
        log.info("collector started", peer=context.peer(), session=session.id)
        return pb.StartEbpfCollectorResponse(
            collector_id=session.id, expires_at=_timestamp(session.expires_at), supported=True
        )

    async def StopCollector(  # noqa: N802
        self, request: pb.StopEbpfCollectorRequest, context: Context
    ) -> pb.StopEbpfCollectorResponse:
        """Ends a collector; see the contract."""
        try:
            await self._supervisor.stop(request.collector_id)
        except RefusedError as error:
            await _refuse(context, error)
        log.info("collector stopped", peer=context.peer(), session=request.collector_id)
        return pb.StopEbpfCollectorResponse(success=True)

    async def RenewCollector(  # noqa: N802
        self, request: pb.RenewCollectorRequest, context: Context
    ) -> pb.RenewCollectorResponse:
        """Moves a deadline; see the contract."""
        duration_s = _seconds(request.duration) if request.HasField("duration") else None
        try:
            session = self._supervisor.renew(request.collector_id, duration_s)
        except RefusedError as error:
            await _refuse(context, error)
        return pb.RenewCollectorResponse(expires_at=_timestamp(session.expires_at))

    async def GetCapabilities(  # noqa: N802
        self, _request: pb.GetCapabilitiesRequest, _context: Context
    ) -> pb.EbpfCapabilities:
        """What can run here; see the contract."""
        from importlib.metadata import version  # noqa: PLC0415  megabytes, and seldom asked for

        features = await self._supervisor.features()
        answer = pb.EbpfCapabilities(
            kernel_version=features.kernel_release,
            btf_available=features["btf"].available,
            cap_bpf=features.cap_bpf,
            agent_id=self._supervisor.config.name,
            agent_version=version("coral-ebpf-agent"),
            libbpf_version=features.libbpf_version,
            features=_features(features.features),
        )
        supports = await self._supervisor.capabilities()
        for kind, collector in COLLECTORS.items():
            support = supports[kind_name(kind)]
            answer.collectors.add(
                kind=kind,
                supported=support.supported,
                hook=support.hook,
                reason=support.reason,
                options=[
                    pb.CollectorOption(
                        name=o.name,
                        accepts=o.accepts,
                        default_value=o.default,
                        description=o.description,
                        refused=support.refused_options.get(o.name),
                    )
                    for o in collector.options()
                ],
                steps=[
                    pb.CollectorStep(
                        what=step.what, taken=step.taken, refused=_features(step.refused)
                    )
                    for step in support.steps
                ],
            )
            if support.supported:
                answer.available_collectors.append(kind)  # type: ignore[arg-type]
        answer.supported = bool(answer.available_collectors)
        if not answer.supported:
            answer.unsupported_reason = features.obstacle or "no collector can run on this kernel"
        return answer

    async def ListCollectors(  # noqa: N802
        self, _request: pb.ListCollectorsRequest, _context: Context
    ) -> pb.ListCollectorsResponse:
        """The collectors at work; see the contract."""
        return pb.ListCollectorsResponse(
            collectors=[_info(s) for s in self._supervisor.sessions.values() if s.started_at]
        )

    async def StreamEvents(  # noqa: N802
        self, request: pb.EbpfEventStreamRequest, context: Context
    ) -> None:
        """Events, one a message; see the contract."""
        await self._stream(request, context, Frame.events)

    async def StreamEventBatches(  # noqa: N802
        self, request: pb.EbpfEventStreamRequest, context: Context
    ) -> None:
        """Events in batches; see the contract."""
        await self._stream(request, context, lambda frame: (frame.wire,))

    async def _stream(
        self,
        request: pb.EbpfEventStreamRequest,
        context: Context,
        messages: Callable[[Frame], Iterable[bytes]],
    ) -> None:
        try:
            session = self._supervisor.find(request.collector_id)
            subscription = session.subscribe(_terms(request, context.peer()))
        except RefusedError as error:
            await _refuse(context, error)
        try:
            # A caller that has the headers knows that it is subscribed.
            await context.send_initial_metadata(())
            async for frame in subscription:
                for message in messages(frame):
                    subscription.blocked_since = time.monotonic()
                    await context.write(message)
                subscription.blocked_since = None
        except SubscriptionEndedError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        finally:
            subscription.close()


def _terms(request: pb.EbpfEventStreamRequest, peer: str) -> Terms:
    return Terms(
        after_seq=request.after_seq,
        overflow=request.overflow,
        queue_bytes=request.queue_bytes,
        wanted=Filter.of(request.filter),
        interactive=request.interactive,
        peer=peer,
    )


def handlers(service: EbpfService) -> grpc.GenericRpcHandler:
    """The service's handlers. Messages of streams are bytes already."""
    return grpc.method_handlers_generic_handler(
        SERVICE.full_name,
        {method.name: _handler(service, method) for method in SERVICE.methods},
    )


def _handler(service: EbpfService, method: Any) -> grpc.RpcMethodHandler[Any, Any]:  # noqa: ANN401
    behaviour: Callable[..., Any] = getattr(service, method.name)
    request: Any = getattr(pb, method.input_type.name)
    response: Any = getattr(pb, method.output_type.name)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(
            behaviour, request_deserializer=request.FromString, response_serializer=None
        )
    return grpc.unary_unary_rpc_method_handler(
        behaviour,
        request_deserializer=request.FromString,
        response_serializer=response.SerializeToString,
    )


async def _refuse(context: Context, error: RefusedError | BpfError) -> Never:
    code = _CODES.get(type(error), grpc.StatusCode.FAILED_PRECONDITION)  # type: ignore[arg-type]
    if isinstance(error, BpfError) and error.errno in EXHAUSTED:
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
    if code is grpc.StatusCode.PERMISSION_DENIED:
        log.warning("refused", peer=context.peer(), code=code.name, reason=str(error))
    if isinstance(error, BpfError):
        log.error("refused by the kernel", peer=context.peer(), what=error.what, said=error.log)
    await context.abort(code, _fitting(str(error)))
    raise AssertionError("abort returned")


def _fitting(text: str) -> str:
    """TEXT, without its middle where it would be more than a client takes: a caller whose value is
    quoted in it would get a transport's error then, in place of the refusal."""
    if len(quote(text, safe=_SENT_AS_IT_IS)) <= _STATUS_BYTES:
        return text
    plain = text.encode("ascii", "backslashreplace").decode()
    return f"{plain[: _STATUS_BYTES // 4]} [...] {plain[-_STATUS_BYTES // 4 :]}"


def _features(features: Iterable[Feature]) -> list[pb.KernelFeature]:
    return [pb.KernelFeature(name=f.name, available=f.available, reason=f.reason) for f in features]


def _info(session: Session) -> pb.CollectorInfo:
    info = pb.CollectorInfo(
        collector_id=session.id,
        kind=session.kind,
        service_name=session.service_name,
        started_at=_timestamp(session.started_at),
        expires_at=None if session.continuous else _timestamp(session.expires_at),
        continuous=session.continuous,
        config=session.config,
        produced=session.channel.produced,
        map_memory_bytes=session.collector.bpf_object.map_memory_bytes,
    )
    for subscription in session.channel.subscriptions:
        account = subscription.account
        info.subscribers.add(
            peer=subscription.terms.peer,
            queued_events=account.queued,
            queued_bytes=account.queued_bytes,
            delivered=account.delivered,
            lost=sum(account.lost.values()),
            filtered=account.filtered,
            lag=session.channel.produced - subscription.last_delivered_seq,
            losses=[
                pb.Loss(stage=stage, count=count)  # type: ignore[arg-type]
                for stage, count in account.lost.items()
            ],
        )
    return info


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _timestamp(unix_s: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(int(unix_s * 1e9))
    return timestamp
