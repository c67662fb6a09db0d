"""The supervisor: sessions under leases, on one TaskGroup. It can be used as a library.

    async with Supervisor() as supervisor:
        session = await supervisor.start(StartRequest("syscall_stats", config={"pid": "1234"}))
        async for frame in session.subscribe():
            ...

It knows nothing of gRPC. One session's failure never touches another.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

import structlog

from coral.agent.config import Config
from coral.agent.errors import InvalidRequestError, LimitError, NotFoundError
from coral.agent.machine.program_stats import ProgramStatsSampler
from coral.agent.sessions import continuous
from coral.agent.sessions.admission import Admission
from coral.agent.sessions.ended import EndedSessions
from coral.agent.sessions.enforcement import enforce
from coral.agent.sessions.feed import Feed
from coral.agent.sessions.session import End, Session, StartRequest, lease_s
from coral.bpf import BpfError, BpfObject, Features
from coral.collectors.contract import Batch, Measures, Support
from coral.collectors.options import format_duration
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_name

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.supervisor")


class Supervisor:
    """Starts, renews and ends sessions. Use it as a context manager: leaving it ends them all."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        self.sessions: dict[str, Session] = {}
        self.started: Counter[int] = Counter()  # by kind
        self.ends: Counter[tuple[int, int]] = Counter()  # by kind and reason
        self.events: Counter[int] = Counter()  # by kind
        self.lost: Counter[tuple[int, int]] = Counter()  # by kind and stage; see `losses`
        self.program_stats = ProgramStatsSampler(self._objects)
        self._admission = Admission(self.config)
        self._feed = Feed(self.config.limits.prometheus_series)
        self._ended = EndedSessions()
        self._closing = False
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._background = [
            self._tasks.create_task(self.program_stats.run(), name="program statistics"),
            self._tasks.create_task(self._enforce_limits(), name="limits"),
            *(
                self._tasks.create_task(
                    continuous.keep(rule, self.start), name=f"continuous {rule.kind}"
                )
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

    @property
    def measures(self) -> Mapping[int, Measures]:
        """What Prometheus is told of each kind."""
        return self._feed.measures

    async def features(self) -> Features:
        """What this kernel can do, with the loader that the configuration wants; found at the first
        call, in a thread."""
        return await self._admission.features()

    async def capabilities(self) -> Mapping[str, Support]:
        """Of each kind of collector, whether it can run here, by which hook, or why not."""
        return await self._admission.capabilities()

    async def start(self, request: StartRequest) -> Session:
        """Starts a collector; it is attached when this returns. Raises a `RefusedError`, or a
        `BpfError` when the kernel refuses; nothing is left of it then."""
        if self._closing:
            raise LimitError("the agent is shutting down")
        collector_type = self._admission.admit(request)
        with ExitStack() as undo:
            undo.enter_context(self._admission.slot(request))
            collector = await self._admission.create(collector_type, request)
            session = Session(collector, request, self.config)
            session.slot = undo.pop_all()
        await self._launch(session)
        await self._refuse_if_too_large(session)
        return session

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
        await enforce(
            self.config.limits,
            self.sessions.values,
            lambda: time.process_time() + self.program_stats.total_s,
            self.memory_bytes,
        )

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
                await session.collector.run(
                    lambda batch: self._publish(session, batch), on_attached
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
        self._feed.observe(session, batch)

    def _finish(self, session: Session, end: End) -> None:
        session.end = end
        session.channel.end(end.reason, end.detail, time.time_ns())
        del self.sessions[session.id]
        session.slot.close()
        self._ended.add(session, end)
        self._feed.leave(session)
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
        if end := self._ended.end_of(session_id):
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
