"""The supervisor: sessions under leases, on one TaskGroup. It can be used as a library.

    async with Supervisor() as supervisor:
        session = await supervisor.start(StartRequest("syscall_stats", config={"pid": "1234"}))
        async for frame in session.subscribe():
            ...

It knows nothing of gRPC. One session's failure never touches another.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Final, Self

import structlog

from coral.agent.config import Config, Continuous
from coral.agent.errors import (
    DeniedError,
    InvalidRequestError,
    LimitError,
    NotFoundError,
    RefusedError,
    UnsupportedError,
)
from coral.agent.machine.privileges import refusal
from coral.agent.machine.program_stats import ProgramStatsSampler
from coral.agent.machine.resolve import resolve
from coral.agent.sessions.budget import CPU_WINDOW_S, Backoff, Candidate, CpuBudget, first_to_go
from coral.agent.sessions.session import End, Session, StartRequest, lease_s
from coral.bpf import BpfError, BpfObject, Features, probe
from coral.bpf.probing import capabilities
from coral.collectors.contract import Batch, Collector, Measures, ServiceProcesses, Support
from coral.collectors.options import OptionError, UnknownOptionError, format_duration
from coral.collectors.registry import COLLECTORS
from coral.collectors.runner import in_thread, run
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_name, kind_of

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.supervisor")

_ENDED_KEPT: Final = 1000
_ENFORCE_EVERY_S: Final = 1.0
_STEADY_S: Final = 60.0
_FINAL: Final = (pb.SessionEnd.REASON_STOPPED, pb.SessionEnd.REASON_AGENT_SHUTDOWN)
_TARGET_KEYS: Final = frozenset({"pid", "comm", "cgroup", "scope"})


class Supervisor:
    """Starts, renews and ends sessions. Use it as a context manager: leaving it ends them all."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        self.sessions: dict[str, Session] = {}
        self.started: Counter[int] = Counter()  # by kind
        self.ends: Counter[tuple[int, int]] = Counter()  # by kind and reason
        self.events: Counter[int] = Counter()  # by kind
        self.lost: Counter[tuple[int, int]] = Counter()  # by kind and stage; see `losses`
        self.measures: dict[int, Measures] = {
            kind: collector.measures(self.config.limits.prometheus_series)
            for kind, collector in COLLECTORS.items()
        }
        self.program_stats = ProgramStatsSampler(self._objects)
        self._ended: OrderedDict[str, End] = OrderedDict()
        self._measured: dict[tuple[int, str], str] = {}  # the session that feeds Prometheus
        self._starting = 0
        self._closing = False
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._background = [
            self._tasks.create_task(self.program_stats.run(), name="program statistics"),
            self._tasks.create_task(self._enforce_limits(), name="limits"),
            *(
                self._tasks.create_task(self._keep(rule), name=f"continuous {rule.kind}")
                for rule in self.config.continuous
            ),
        ]
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        await self.shutdown()
        for task in self._background:
            task.cancel()
        # Sessions raise nothing: what is under way is the caller's own, and stays as it is.
        await self._tasks.__aexit__(None, None, None)

    async def shutdown(self) -> None:
        """Ends every session for AGENT_SHUTDOWN; nothing can be started afterwards."""
        self._closing = True
        end = End(pb.SessionEnd.REASON_AGENT_SHUTDOWN, "the agent is shutting down")
        await asyncio.gather(*(session.stop(end) for session in tuple(self.sessions.values())))

    async def features(self) -> Features:
        """What this kernel can do, with the loader that the configuration wants; found at the first
        call, in a thread."""
        found, wanted = await in_thread(probe), self.config.loader
        return found if wanted == "auto" else replace(found, loader=wanted)

    async def capabilities(self) -> Mapping[str, Support]:
        """Of each kind of collector, whether it can run here, by which hook, or why not."""
        features = await self.features()
        return {
            kind_name(kind): self._support(collector, features)
            for kind, collector in COLLECTORS.items()
        }

    def _support(self, collector: type[Collector], features: Features) -> Support:
        has = features.capabilities
        if features.obstacle and features.obstacle != capabilities.obstacle(has):
            return Support(False, reason=features.obstacle)
        reason = refusal(
            collector.needs(),
            has,
            capabilities.of_kernel(),
            observe_only=self.config.policy.observe_only,
        )
        return Support(False, reason=reason) if reason else collector.support(features)

    async def start(self, request: StartRequest) -> Session:
        """Starts a collector; it is attached when this returns. Raises a `RefusedError`, or a
        `BpfError` when the kernel refuses; nothing is left of it then."""
        collector_type = self._admit(request)
        self._starting += not request.continuous
        try:
            features = await self.features()
            support = self._support(collector_type, features)
            if not support.supported:
                raise UnsupportedError(f"{kind_name(collector_type.kind)}: {support.reason}")
            service = await self._resolve(request)
            try:
                collector = collector_type.create(request.config, service, features)
            except (OptionError, UnknownOptionError) as error:
                raise InvalidRequestError(str(error)) from error
            session = Session(collector, request, self.config)
        except OSError as error:  # /proc cannot be read: there are no descriptors left
            raise BpfError(f"reading {error.filename}", error.errno or errno.EIO) from error
        finally:
            self._starting -= not request.continuous
        await self._launch(session)  # counted among the sessions from its first step on
        await self._refuse_if_too_large(session)
        return session

    def _admit(self, request: StartRequest) -> type[Collector]:
        """Everything that can be refused without looking at the machine."""
        kind = _kind(request.kind)
        config, policy = self.config, self.config.policy
        if self._closing:
            raise LimitError("the agent is shutting down")
        if policy.collectors and kind_name(kind) not in policy.collectors:
            raise DeniedError(
                f"kind: {kind_name(kind)} is not allowed by this agent's policy.collectors, "
                f"{', '.join(policy.collectors)}"
            )
        if request.config.get("scope") == "host" and not policy.host_scope:
            raise DeniedError(
                "config[\"scope\"]: 'host' is not allowed by this agent's policy.host_scope"
            )
        lease_s(request.duration_s, config)
        if kind not in COLLECTORS:
            raise UnsupportedError(
                f"this agent has no {kind_name(kind)} collector; it has "
                + ", ".join(map(kind_name, COLLECTORS))
            )
        most = config.limits.concurrent_collectors
        at_work = self._starting + sum(not s.continuous for s in self.sessions.values())
        if at_work >= most and not request.continuous:
            raise LimitError(
                f"limits.concurrent_collectors is {most}, and {at_work} are at work: stop one, or "
                f"wait for its lease to end, before you start this {kind_name(kind)}"
            )
        return COLLECTORS[kind]

    async def _resolve(self, request: StartRequest) -> ServiceProcesses | None:
        if not request.service_name or _TARGET_KEYS & request.config.keys():
            return None
        return await in_thread(lambda: resolve(request.service_name, self.config.services))

    async def _launch(self, session: Session) -> None:
        attached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sessions[session.id] = session
        session.task = self._tasks.create_task(
            self._run(session, attached), name=f"session {session.id}"
        )
        try:
            await attached
        except asyncio.CancelledError:  # the caller went away: nobody would know this session
            await session.stop(End(pb.SessionEnd.REASON_STOPPED, "the caller went away"))
            raise
        self.started[session.kind] += 1
        log.info(
            "session started",
            session=session.id,
            kind=kind_name(session.kind),
            service=session.service_name,
            lease=format_duration(session.lease_s) if session.lease_s else "none",
        )

    async def _refuse_if_too_large(self, session: Session) -> None:
        limit, used = self.config.limits.memory, self.memory_bytes()
        if used > limit:
            own = session.memory_bytes
            await session.stop(End(pb.SessionEnd.REASON_PREEMPTED, "limits.memory"))
            raise LimitError(
                f"limits.memory is {limit} bytes; this {kind_name(session.kind)} takes {own}, "
                f"which makes {used} in all: ask for smaller buffers, or stop another collector"
            )

    def memory_bytes(self) -> int:
        """Maps and buffers of all sessions."""
        return sum(session.memory_bytes for session in self.sessions.values())

    async def _enforce_limits(self) -> None:
        """Every second: preempts the session of the lowest priority while a limit is passed, and
        lets go of subscribers that do not read."""
        limits = self.config.limits
        cpu = CpuBudget(limits.cpu_percent)
        while True:
            await asyncio.sleep(_ENFORCE_EVERY_S)
            cpu.add(time.monotonic(), time.process_time() + self.program_stats.total_s)
            if cpu.exceeded:
                await self._preempt(
                    f"limits.cpu_percent is {limits.cpu_percent:g} of one CPU; "
                    f"{cpu.used_percent:.1f} were used over {CPU_WINDOW_S:g}s"
                )
                cpu.restart()
            if (used := self.memory_bytes()) > limits.memory:
                await self._preempt(f"limits.memory is {limits.memory} bytes; {used} were used")
            self._release_stalled(limits.stalled_subscriber)

    async def _preempt(self, detail: str) -> None:
        session = first_to_go(
            Candidate(session, session.priority, session.started_at)
            for session in self.sessions.values()
            if session.started_at
        )
        if session:
            await session.stop(End(pb.SessionEnd.REASON_PREEMPTED, detail))

    def _release_stalled(self, patience_s: float) -> None:
        now = time.monotonic()
        for session in self.sessions.values():
            for subscription in tuple(session.channel.subscriptions):
                since = subscription.blocked_since
                if since is not None and now - since > patience_s:
                    log.warning(
                        "subscriber let go", session=session.id, peer=subscription.terms.peer
                    )
                    subscription.fail(
                        f"nothing was read for {format_duration(patience_s)}, this agent's "
                        "limits.stalled_subscriber"
                    )
                    subscription.close()

    async def _keep(self, rule: Continuous) -> None:
        """Keeps a continuous collector at work: again after a failure, with growing pauses."""
        request = StartRequest(rule.kind, rule.service, rule.config, continuous=True)
        backoff = Backoff()
        while True:
            try:
                session = await self.start(request)
            except (RefusedError, BpfError) as error:
                reason = str(error)
            else:
                began = time.monotonic()
                await session.ended.wait()
                if time.monotonic() - began > _STEADY_S:
                    backoff.succeeded()
                reason = str(session.end)
                if session.end and session.end.reason in _FINAL:
                    return
            pause_s = backoff.pause_s()
            log.warning(
                "continuous collector is not at work",
                kind=rule.kind,
                service=rule.service,
                reason=reason,
                again_in=f"{pause_s:.1f}s",
            )
            await asyncio.sleep(pause_s)

    async def _run(self, session: Session, attached: asyncio.Future[None]) -> None:
        """The life of a session. Raises nothing but its own cancellation."""

        def on_attached() -> None:
            session.started_at = time.time()
            if session.lease_s is not None:
                session.renew(session.lease_s)
            if not attached.done():
                attached.set_result(None)

        end = End(pb.SessionEnd.REASON_TARGET_EXITED)
        failure: Exception | None = None
        try:
            async with asyncio.timeout(None) as session.lease:
                await run(
                    session.collector, lambda batch: self._publish(session, batch), on_attached
                )
        except asyncio.CancelledError:
            end = session.wanted_end or End(pb.SessionEnd.REASON_AGENT_SHUTDOWN)
            raise
        except Exception as error:  # whatever it is, it ends this session alone
            lease = session.lease
            if isinstance(error, TimeoutError) and lease and lease.expired():
                end = End(pb.SessionEnd.REASON_EXPIRED)
            else:
                end = End(pb.SessionEnd.REASON_FAILED, str(error))
                failure = error
                if not isinstance(error, BpfError):
                    log.exception("session failed for what is not expected", session=session.id)
                    failure = BpfError(f"{kind_name(session.kind)} failed: {error!r}")
        finally:
            self._finish(session, end)
            if not attached.done():
                attached.set_exception(failure or NotFoundError(f"the session ended: {end}"))

    def _publish(self, session: Session, batch: Batch) -> None:
        if not batch:
            return
        session.channel.publish(batch)
        self.events[session.kind] += len(batch.rows)
        for stage, count in batch.losses.items():
            self.lost[session.kind, stage] += count
        # Two sessions that watch the same service would count its calls twice.
        feeds = self._measured.setdefault((session.kind, session.service_name), session.id)
        if feeds == session.id:
            self.measures[session.kind].observe(session.service_name, batch)

    def _finish(self, session: Session, end: End) -> None:
        session.end = end
        session.channel.end(end.reason, end.detail, time.time_ns())
        del self.sessions[session.id]
        self._ended[session.id] = end
        while len(self._ended) > _ENDED_KEPT:
            self._ended.popitem(last=False)
        if self._measured.get((session.kind, session.service_name)) == session.id:
            del self._measured[session.kind, session.service_name]
        self.ends[session.kind, end.reason] += 1
        for stage, count in session.channel.subscribers_lost.items():
            self.lost[session.kind, stage] += count
        session.ended.set()
        event = log.error if end.reason == pb.SessionEnd.REASON_FAILED else log.info
        event("session ended", session=session.id, kind=kind_name(session.kind), end=str(end))

    def find(self, session_id: str) -> Session:
        """The session of that id. Raises `NotFoundError`; of one that has ended, with how."""
        if session := self.sessions.get(session_id):
            return session
        if end := self._ended.get(session_id):
            raise NotFoundError(f"collector_id: {session_id} has ended: {end}")
        raise NotFoundError(f"collector_id: this agent knows no collector {session_id!r}")

    async def stop(self, session_id: str) -> None:
        """Ends a session. Raises `NotFoundError`."""
        await self.find(session_id).stop(End(pb.SessionEnd.REASON_STOPPED))

    def renew(self, session_id: str, duration_s: float | None = None) -> Session:
        """Gives a session a new lease from now on. Raises `NotFoundError`,
        `InvalidRequestError`."""
        session = self.find(session_id)
        if session.continuous:
            raise InvalidRequestError(
                f"collector_id: {session_id} is continuous, by the agent's configuration: it has "
                "no lease"
            )
        session.renew(lease_s(duration_s, self.config))
        return session

    def losses(self) -> Counter[tuple[int, int]]:
        """Events lost so far, by kind and stage, of sessions that ended and of those at work."""
        total = self.lost.copy()
        for session in tuple(self.sessions.values()):
            for stage, count in tuple(session.channel.subscribers_lost.items()):
                total[session.kind, stage] += count
        return total

    def _objects(self) -> Iterator[tuple[int, BpfObject]]:
        for session in self.sessions.values():
            if session.started_at:
                yield session.kind, session.collector.bpf_object


def _kind(kind: str | int) -> int:
    accepted = "one of " + ", ".join(
        f"{name} ({number})" for name, number in pb.EbpfCollectorKind.items() if number
    )
    if isinstance(kind, str):
        try:
            return kind_of(kind)
        except ValueError:
            pass
    elif kind and kind in pb.EbpfCollectorKind.values():
        return kind
    raise InvalidRequestError(f"kind: {kind!r} is not accepted; give {accepted}")
