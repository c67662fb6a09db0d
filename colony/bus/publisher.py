"""The face of a store for followers, with a stream behind it: what is put is published, and durable
once JetStream has acknowledged it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import msgspec
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, RawStreamMsg
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError

from coral.colony.bus import envelope, subjects
from coral.colony.bus.connection import FAILURES, BusError, Connection, is_wrong_sequence
from coral.colony.bus.envelope import Told
from coral.colony.bus.outbox import Message, Numbered, Outbox
from coral.colony.bus.settings import BusSettings
from coral.colony.delivery import AgentSeen, Delivery, Gap, Standing

_FOUND_AT_ONCE: Final = 500
_HEADER_ROOM_BYTES: Final = 512  # of the server's limit, for names and ends of headers
_FORGET_EVERY_S: Final = 600.0


@dataclass(slots=True)
class PublisherCounts:
    """Messages, since the publisher was made. `repeated` were in the stream already; `diverged`
    says how often somebody else had published a session's events in other messages. `too_large`
    are events, lost because their batch was larger than the server accepts."""

    published: int = 0
    bytes: int = 0
    repeated: int = 0
    failures: int = 0
    diverged: int = 0
    too_large: int = 0
    waiting: int = 0
    waiting_bytes: int = 0


class Publisher:
    """Use it as a context manager, or `start` and `close` it."""

    def __init__(self, settings: BusSettings) -> None:
        self.settings = settings
        self._connection = Connection(settings, "coral colony, following")
        self._outbox = Outbox(settings.prefix, 0)
        self._counts = PublisherCounts()
        self._repeated = 0
        self._work = asyncio.Event()
        self._progress = asyncio.Condition()
        self._slots = asyncio.Semaphore(settings.in_flight)
        self._pump: asyncio.Task[None] | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None]

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Connects, and reads how each session stands; returns when that is known. Raises
        `BusError`."""
        try:
            await self._connection.open()
            found = await self._find_until_found()
        except BaseException:
            await self._connection.close()
            raise
        most_bytes = self._connection.client.max_payload - _HEADER_ROOM_BYTES
        self._outbox = Outbox(self.settings.prefix, most_bytes, found)
        self._failure = asyncio.get_running_loop().create_future()
        self._pump = asyncio.create_task(self._run())
        self._pump.add_done_callback(self._ended)

    async def run(self) -> None:
        """Returns never. Raises whatever ended the sending of a message: neither it nor what
        follows it in its session would be sent again."""
        await asyncio.shield(self._failure)

    async def close(self, wait_s: float = 5.0) -> None:
        """Waits until all is acknowledged, so long at most, and disconnects."""
        if self._pump:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self.stored()
            for task in (self._pump, *self._sending):
                task.cancel()
            await asyncio.gather(self._pump, *self._sending, return_exceptions=True)
        await self._connection.close()

    @property
    def counts(self) -> PublisherCounts:
        """As of now."""
        counts = self._counts
        counts.waiting, counts.waiting_bytes = len(self._outbox), self._outbox.waiting_bytes
        counts.too_large, counts.diverged = self._outbox.too_large, self._outbox.diverged
        counts.repeated = self._repeated + self._outbox.repeated
        return counts

    @property
    def is_up(self) -> bool:
        """Whether there is a connection now."""
        return self._connection.is_up

    def put(self, delivery: Delivery) -> bool:
        """Queues DELIVERY; False for one that was put before. Raises `SequenceError` where it does
        not follow on what was put of its session, or on what somebody else published of it."""
        is_news = self._outbox.admit(delivery)
        self._work.set()
        return is_news

    async def room(self) -> None:
        """Waits while too many bytes wait."""
        most = self.settings.queue_bytes
        async with self._progress:
            await self._progress.wait_for(lambda: self._outbox.waiting_bytes < most)

    def standing(self, agent_id: str, collector_id: str) -> Standing | None:
        """What the stream has of a session."""
        return self._outbox.standing(agent_id, collector_id)

    def standings(self) -> Sequence[Standing]:
        """The same of every session."""
        return tuple(self._outbox.standings())

    async def stored(self) -> None:
        """Returns when the stream has all that was put so far."""
        number = self._outbox.last_number
        async with self._progress:
            await self._progress.wait_for(lambda: self._outbox.has_all_up_to(number))

    def agent_seen(self, agent: AgentSeen) -> None:
        """How an agent fares."""
        self._outbox.admit_apart(agent)
        self._work.set()

    def gap(self, gap: Gap) -> None:
        """When an agent could not be followed."""
        self._outbox.admit_apart(gap)
        self._work.set()

    async def _run(self) -> None:
        forget_at = time.monotonic() + _FORGET_EVERY_S
        while True:
            await self._work.wait()
            self._work.clear()
            await self._connection.up()
            while message := self._outbox.next():
                await self._slots.acquire()
                task = asyncio.create_task(self._send(message))
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)
                task.add_done_callback(self._ended)
            if time.monotonic() > forget_at:
                forget_at = time.monotonic() + _FORGET_EVERY_S
                self._outbox.forget(time.time_ns() - int(self.settings.max_age_s * 1e9))

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and not self._failure.done():
            self._failure.set_exception(error)

    async def _send(self, message: Message) -> None:
        """Sends MESSAGE until the stream has it, or has no place for it."""
        backoff = self._connection.backoff()
        try:
            while True:
                try:
                    await self._connection.up()
                    if await self._try(message):
                        return
                except FAILURES as error:
                    self._counts.failures += 1
                    self._connection.tell("the bus did not accept a message", error)
                    await asyncio.sleep(backoff.delay_s(time.monotonic()) or 0.0)
                    if isinstance(error, NoStreamResponseError):
                        await self._make_stream()
        finally:
            self._slots.release()
            self._work.set()
            async with self._progress:
                self._progress.notify_all()

    async def _try(self, message: Message) -> bool:
        """Whether nothing is left to be done for MESSAGE."""
        try:
            ack = await self._connection.stream.publish(
                message.subject,
                message.payload,
                timeout=self.settings.timeout_s,
                stream=self.settings.stream,
                headers=self._outbox.headers(message),
            )
        except APIError as error:
            if not isinstance(message, Numbered) or not is_wrong_sequence(error):
                raise
            last = await self._connection.last_of(message.subject)
            found = _told_of(last)
            return not self._outbox.refused(message, found, (last.seq or 0) if last else 0)
        if ack.duplicate:
            self._repeated += 1
        else:
            self._counts.published += 1
            self._counts.bytes += message.size_bytes
        self._outbox.stored(message, ack.seq)
        return True

    async def _make_stream(self) -> None:
        """The server has no such stream: it is starting, or has lost it."""
        try:
            await self._connection.ensure_stream()
        except (*FAILURES, BusError) as error:
            self._connection.tell("the stream cannot be made", error)

    async def _find_until_found(self) -> list[tuple[Told, int]]:
        backoff = self._connection.backoff()
        while True:
            try:
                return await self._find()
            except FAILURES as error:
                self._connection.tell("the bus does not answer", error)
                await asyncio.sleep(backoff.delay_s(time.monotonic()) or 0.0)

    async def _find(self) -> list[tuple[Told, int]]:
        """The last message of each session, by its headers alone."""
        stream = self._connection.stream
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.LAST_PER_SUBJECT,
            ack_policy=AckPolicy.NONE,
            headers_only=True,
            mem_storage=True,
            num_replicas=1,
            inactive_threshold=60.0,
        )
        subject = subjects.batches(self.settings.prefix)
        reading = await stream.pull_subscribe(subject, stream=self.settings.stream, config=config)
        found: list[tuple[Told, int]] = []
        try:
            left = (await reading.consumer_info()).num_pending or 0
            while left > 0:
                for message in await reading.fetch(min(left, _FOUND_AT_ONCE), timeout=10):
                    left -= 1
                    with suppress(msgspec.MsgspecError):
                        if told := envelope.told_of(message.headers):
                            found.append((told, message.metadata.sequence.stream))
        finally:
            with suppress(*FAILURES):
                name = (await reading.consumer_info()).name
                await reading.unsubscribe()
                with suppress(NotFoundError):
                    await stream.delete_consumer(self.settings.stream, name)
        return found


def _told_of(message: RawStreamMsg | None) -> Told | None:
    """What the last message of a session says; None where there is none, or somebody else's."""
    with suppress(msgspec.MsgspecError):
        return envelope.told_of(message.headers) if message else None
    return None
