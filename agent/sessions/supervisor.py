"""The supervisor: sessions under leases, each in a task of its own. It can be used as a library.

    async with Supervisor() as supervisor:
        session = await supervisor.start(StartRequest("syscall_stats", config={"pid": "1234"}))
        async for frame in session.subscribe():
            ...

It knows nothing of gRPC. One session's failure never touches another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

import structlog

from coral.agent.access.access import Access, Verdict
from coral.agent.access.rpcs import START
from coral.agent.access.target import Ownership
from coral.agent.caller import LIBRARY, Caller
from coral.agent.config import Config
from coral.agent.errors import (
    DeniedError,
    FailedPreconditionError,
    LimitError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)
from coral.agent.machine.pods.node import Pods
from coral.agent.machine.program_stats import ProgramStatsSampler, Sampled
from coral.agent.sessions import continuous
from coral.agent.sessions.admission import Admission
from coral.agent.sessions.background import keep_going
from coral.agent.sessions.budget import Needs, Room
from coral.agent.sessions.changes import Changes, Watch
from coral.agent.sessions.ended import EndedSessions
from coral.agent.sessions.enforcement import by_cpu, enforce
from coral.agent.sessions.feed import Feed
from coral.agent.sessions.info import info_of
from coral.agent.sessions.session import End, Session, StartRequest, lease_s
from coral.agent.sessions.totals import Totals
from coral.agent.streams import Readers, shorten_queues
from coral.bpf import BpfError, Features
from coral.collectors.contract import Batch, Measures, Support
from coral.collectors.hubs import HUBS
from coral.collectors.metering import metered
from coral.collectors.options import format_duration
from coral.collectors.runner import completed, run
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_name

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.supervisor")

_SHUTDOWN: Final = End(pb.SessionEnd.REASON_AGENT_SHUTDOWN, "the agent is shutting down")
_TARGET_EXITED: Final = End(pb.SessionEnd.REASON_TARGET_EXITED)


class Supervisor:
    """Starts, renews and ends sessions. Use it as a context manager: leaving it ends them all."""

    def __init__(self, config: Config | None = None, access: Access | None = None) -> None:
        self.config = config or Config()
        self.access = access or Access(self.config)
        self.sessions: dict[str, Session] = {}  # from the first step of their tasks to their end
        self.totals = Totals()
        self.ended = EndedSessions(self.config.limits, self.totals.leave)
        self.program_stats = ProgramStatsSampler(self._sampled)
        self.readers = Readers(self.config.limits.stalled_subscriber)
        self._admission = Admission(self.config, self.access)
        self._changes = Changes()
        self._feed = Feed(
            self.config.limits.prometheus_series, pod_label=self.config.kubernetes.pod_label
        )
        self._room = Room(self.config.limits)
        self.continuous_changed = asyncio.Event()
        self.continuous = tuple(
            continuous.Standing(rule, self.continuous_changed.set)
            for rule in self.config.continuous
        )
        self.observers: list[Callable[[Session, Batch], None]] = []
        """Called on the event loop with each batch that is published."""
        self._closing = False
        self._background: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()  # the sessions'

    async def __aenter__(self) -> Self:
        work: list[tuple[str, Callable[[], Coroutine[Any, Any, None]]]] = [
            ("program statistics", self.program_stats.run),
            ("stalled readers", self.readers.watch),
            ("limits", partial(enforce, self.config.limits, self)),
            *(
                (
                    f"continuous {standing.kind}",
                    partial(continuous.keep, standing, self.start, self._has_room),
                )
                for standing in self.continuous
            ),
        ]
        self._background = [asyncio.create_task(keep_going(*each), name=each[0]) for each in work]
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        # A cancellation goes on once nothing is left.
        await completed(asyncio.ensure_future(self._wind_up()))

    async def _wind_up(self) -> None:
        await self.shutdown()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    async def shutdown(self) -> None:
        """Ends every session for AGENT_SHUTDOWN, then every watch. Nothing can be started
        afterwards."""
        self._closing = True
        sessions = tuple(self.sessions.values())
        for session in sessions:
            session.end_for(_SHUTDOWN)
        for session in sessions:
            await session.ended.wait()
        self._changes.close()

    @property
    def pods(self) -> Pods:
        """What is known of the pods of this node."""
        return self._admission.pods

    @property
    def measures(self) -> Mapping[int, Measures]:
        """The metrics of each kind for Prometheus."""
        return self._feed.measures

    async def features(self) -> Features:
        """What this kernel can do, with the loader that the configuration wants; probed at the
        first call, in a thread."""
        return await self._admission.features()

    async def capabilities(self) -> Mapping[str, Support]:
        """For each kind of collector, whether it can run here, by which hook, or why not."""
        return await self._admission.capabilities()

    async def start(self, request: StartRequest, caller: Caller = LIBRARY) -> Session:
        """Starts a collector for CALLER; it is attached when this returns. Raises a `RefusedError`,
        or a `BpfError` when the kernel refuses; nothing is left of it then."""
        asked = _asked(request)
        try:
            session = await self._admitted(request, caller, asked)
        except DeniedError as error:
            verdict = Verdict(False, self.access.role_of(caller.identity), str(error))
            self.access.audit.decided(caller, START, verdict, asked=asked, resolved=error.resolved)
            raise
        except LimitError as error:
            self._audit_limit(caller, error, asked)
            raise
        try:
            await self._launch(session)
        except LimitError as error:
            self._audit_limit(caller, error, asked, session.id)
            raise
        log.info(
            "session started",
            session=session.id,
            kind=kind_name(session.kind),
            service=session.service_name,
            lease=format_duration(session.lease_s) if session.lease_s else "none",
            peer=caller.peer,
            by=session.ownership.by,
        )
        return session

    def _audit_limit(
        self, caller: Caller, error: LimitError, asked: Mapping[str, object], session: str = ""
    ) -> None:
        """Notes that a limit stands against a start. Those of the configuration try again and
        again, without a caller."""
        error.is_audited = True
        if caller is LIBRARY:
            return
        verdict = Verdict(False, self.access.role_of(caller.identity), str(error))
        self.access.audit.decided(
            caller, START, verdict, asked=asked, session=session, limit=error.limit
        )

    async def _admitted(
        self, request: StartRequest, caller: Caller, asked: Mapping[str, object]
    ) -> Session:
        """A session that may be launched, in the words of the audit ASKED for. Raises as `start`
        does."""
        collector_type = self._admission.admit(request)
        with ExitStack() as undo:
            self._check_open()
            undo.enter_context(self._admission.slot(request))
            request = await self._admission.translate(request, caller)
            admitted = await self._admission.create(collector_type, request, caller)
            self._check_open()
            verdict, audit = admitted.verdict, self.access.audit
            if verdict:
                principal = caller.identity.principal
                undo.enter_context(self.access.quotas.session(principal, verdict.allowance))
            session = Session(admitted.collector, request, self.config, admitted.ownership)
            session.slot = undo.pop_all()
        if admitted.pods:
            admitted.pods.joined = partial(audit.joined, session.id)
        resolved = admitted.target.described()
        if verdict:
            audit.decided(
                caller, START, verdict, asked=asked, resolved=resolved, session=session.id
            )
        else:
            audit.continuous(session.id, asked, resolved)
        return session

    def _check_open(self) -> None:
        if self._closing:
            raise UnavailableError(_SHUTDOWN.detail)

    async def _launch(self, session: Session) -> None:
        """Returns when SESSION is attached; raises why it could not be."""
        attached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sessions[session.id] = session
        task = asyncio.create_task(self._run(session, attached), name=f"session {session.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await attached
        except asyncio.CancelledError:  # the caller went away: nobody would know this session
            await session.stop(End(pb.SessionEnd.REASON_STOPPED, "the caller went away"))
            raise

    async def _run(self, session: Session, attached: asyncio.Future[None]) -> None:
        """The life of a session. Raises nothing but its own cancellation."""

        def on_attached() -> None:
            self._check_memory(session)
            session.attached()
            self.totals.add(session)
            self._feed.join(session)
            self._publish_change(pb.CollectorChange.WHAT_STARTED, session)
            if not attached.done():
                attached.set_result(None)

        failure: Exception | None = None
        try:
            working = run(
                session.collector, partial(self._publish, session), on_attached, session.stopping
            )
            await metered(working, session.costs.charge_reading)
        except asyncio.CancelledError:  # of the whole event loop: nothing here cancels a session
            session.end_for(_SHUTDOWN)
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, it ends this session alone
            # It is told even where another end was decided: rows may be missing.
            failure, session.decided_end = self._failure(session, error)
        else:
            session.end_for(_TARGET_EXITED)
        finally:
            end = self._finish(session)
            if not attached.done():
                attached.set_exception(failure or _ended_early(end))

    def _failure(self, session: Session, error: Exception) -> tuple[Exception, End]:
        """What the starter of SESSION is told of ERROR, and what its subscribers are."""
        if isinstance(error, LimitError):
            return error, End(pb.SessionEnd.REASON_PREEMPTED, str(error))
        end = End(pb.SessionEnd.REASON_FAILED, str(error))
        if isinstance(error, BpfError):
            return error, end
        log.exception("session failed unexpectedly", session=session.id)
        return BpfError(f"{kind_name(session.kind)} failed: {error!r}"), end

    def _check_memory(self, session: Session) -> None:
        limit, used = self.config.limits.memory, self.memory_bytes()
        if used > limit:
            raise LimitError(
                f"limits.memory is {limit} bytes; this {kind_name(session.kind)} takes "
                f"{session.memory_bytes}, which makes {used} in all: ask for smaller buffers, or "
                "stop another collector",
                "limits.memory",
            )

    def _publish(self, session: Session, batch: Batch) -> None:
        if batch and session.started_at:  # not of one that is refused after it was attached
            session.channel.publish(batch)
            self.totals.add_batch(session.kind, batch)
            self._feed.observe(session, batch)
            for observe in self.observers:
                observe(session, batch)

    def _publish_change(self, what: pb.CollectorChange.What, session: Session) -> None:
        self._changes.publish(what, info_of(session), session.ownership)

    def _finish(self, session: Session) -> End:
        del self.sessions[session.id]
        end = session.finish()
        self._feed.leave(session)
        if session.started_at:
            self.totals.ended[session.kind, end.reason] += 1
            self.ended.add(session)
            self._publish_change(pb.CollectorChange.WHAT_ENDED, session)
        self.access.audit.ended(session.id, str(end), session.channel.produced)
        event = log.error if end.reason == pb.SessionEnd.REASON_FAILED else log.info
        event("session ended", session=session.id, kind=kind_name(session.kind), end=str(end))
        return end

    def find(self, session_id: str) -> Session:
        """The session of that id. Raises `NotFoundError`, which says how one that has ended did."""
        if session := self.sessions.get(session_id):
            return session
        if end := self.ended.end_of(session_id):
            raise _has_ended(session_id, end)
        raise unknown(session_id)

    def ownership(self, session_id: str) -> Ownership | None:
        """What access to the session of that id depends on; None for one that the agent does not
        know, or no more."""
        if session := self.sessions.get(session_id) or self.ended.find(session_id):
            return session.ownership
        return self.ended.ownership_of(session_id)

    def readable(self, session_id: str) -> Session:
        """The session of that id, if its stream can be read: until its end, and for a while
        afterwards. Raises `NotFoundError`."""
        return self.ended.find(session_id) or self.find(session_id)

    async def stop(self, session_id: str, caller: Caller = LIBRARY) -> None:
        """Ends a session. Raises `NotFoundError`."""
        session = self.find(session_id)
        log.info("session stopped", session=session_id, peer=caller.peer)
        await session.stop(End(pb.SessionEnd.REASON_STOPPED))

    def renew(self, session_id: str, duration_s: float | None = None) -> Session:
        """Gives a session a new lease from now on. Raises `NotFoundError`, `InvalidRequestError`,
        or `FailedPreconditionError` for one that has no lease."""
        session = self.find(session_id)
        if end := session.decided_end:
            raise _has_ended(session_id, end)
        if session.continuous:
            raise FailedPreconditionError(
                f"collector_id: {session_id} is continuous, by the agent's configuration: it has "
                "no lease"
            )
        session.renew(lease_s(duration_s, self.config))
        return session

    def watch(self) -> Watch:
        """The sessions at work, then each that starts or ends. Raises `UnavailableError`."""
        return self._changes.watch((info_of(each), each.ownership) for each in self.at_work())

    def at_work(self) -> list[Session]:
        """The sessions that are attached."""
        return [session for session in self.sessions.values() if session.at_work]

    def memory_bytes(self) -> int:
        """Maps and buffers of all sessions. Over the limit, maps that wait for a next session and
        ended sessions make room first."""
        self.ended.tick()
        limit, own = self.config.limits.memory, self._own_memory_bytes()
        if own + self.ended.memory_bytes > limit:
            HUBS.give_up_prepared()
            own = self._own_memory_bytes()
            self.ended.make_room(own + self.ended.memory_bytes - limit)
        return own + self.ended.memory_bytes

    def _own_memory_bytes(self) -> int:
        return sum(session.memory_bytes for session in self.sessions.values())

    def shorten_queues(self, wanted_bytes: int) -> None:
        """Frees WANTED_BYTES of what waits for subscribers that do not keep up, or all of it."""
        sessions = (*self.sessions.values(), *self.ended.in_memory())
        shorten_queues([session.channel for session in sessions], wanted_bytes)

    def _has_room(self, needs: Needs) -> bool:
        candidates, used_bytes = by_cpu(self.at_work()), self.memory_bytes()
        return self._room.take(needs, candidates, used_bytes, time.monotonic())

    def _sampled(self) -> Iterator[Sampled]:
        for session in self.at_work():
            yield Sampled(session.kind, session.collector.bpf_object, session.costs.programs)


def unknown(session_id: str) -> NotFoundError:
    """The answer for a session that there is not, or not for this caller."""
    return NotFoundError(f"collector_id: this agent knows no collector {session_id!r}")


def _asked(request: StartRequest) -> Mapping[str, object]:
    """The target in the request's own words, for the audit."""
    asked = {"kind": str(request.kind), "service": request.service_name, "config": request.config}
    if isinstance(request.kind, int) and request.kind in pb.EbpfCollectorKind.values():
        asked["kind"] = kind_name(request.kind)
    return {name: value for name, value in asked.items() if value}


def _has_ended(session_id: str, end: End) -> NotFoundError:
    return NotFoundError(f"collector_id: {session_id} has ended: {end}")


def _ended_early(end: End) -> RefusedError:
    if end.reason == pb.SessionEnd.REASON_AGENT_SHUTDOWN:
        return UnavailableError(end.detail)
    return NotFoundError(f"the session ended before it was attached: {end}")
