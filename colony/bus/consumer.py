"""Reads the stream into a store. Where it stands is what the store has: a message is acknowledged
once its rows are durable, and one that comes again is left out by its number."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
import structlog
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import NotFoundError

from coral.colony.bus import envelope, subjects
from coral.colony.bus.connection import FAILURES, Connection
from coral.colony.bus.inbox import Inbox, Order, OutOfOrderError
from coral.colony.bus.settings import BusSettings
from coral.colony.delivery import AgentSeen, Delivery, Gap, Standing

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

_FETCH_S: Final = 1.0
_MOST_UNACKNOWLEDGED: Final = 100_000


class Keeper(Protocol):
    """What the consumer needs of a store."""

    def put(self, delivery: Delivery) -> object:
        """Queues DELIVERY."""

    async def room(self) -> None:
        """Waits while too much waits."""

    async def stored(self) -> None:
        """Returns when all that was put so far is durable."""

    def standing(self, agent_id: str, collector_id: str) -> Standing | None:
        """What is durable of a session."""

    def agent_seen(self, agent: AgentSeen) -> object:
        """How an agent fares."""

    def gap(self, gap: Gap) -> object:
        """When an agent could not be followed."""


@dataclass(slots=True)
class ConsumerCounts:
    """Since the consumer was made. `lag` counts the messages that the stream has and the consumer
    has not read, as of the last one."""

    read: int = 0
    bytes: int = 0
    repeated: int = 0
    begun: int = 0
    failures: int = 0
    lag: int = 0


class _Position:
    """Up to where the present consumer was read, over a connection that has broken BREAKS times
    before."""

    def __init__(self, breaks: int) -> None:
        self.breaks = breaks
        self.order = Order()
        self.last: Msg | None = None
        self.moved = asyncio.Event()


class Consumer:
    """Reads this colony's share of the stream into STORE."""

    def __init__(self, settings: BusSettings, store: Keeper) -> None:
        self.settings = settings
        self._store = store
        self._filters = subjects.share(settings.prefix, settings.shard, settings.shards)
        self._connection = Connection(settings, f"coral colony {settings.consumer}")
        self._counts = ConsumerCounts()
        self.inbox = Inbox(store.standing)

    @property
    def counts(self) -> ConsumerCounts:
        """As of now."""
        self._counts.repeated = self.inbox.repeated
        return self._counts

    @property
    def is_up(self) -> bool:
        """Whether there is a connection now."""
        return self._connection.is_up

    async def run(self) -> None:
        """Reads until it is cancelled. Raises `BusError`."""
        try:
            await self._connection.open()
            backoff = self._connection.backoff()
            while True:
                read = self._counts.read
                try:
                    await self._connection.up()
                    await self._read()
                except (*FAILURES, OutOfOrderError) as error:
                    self._counts.failures += 1
                    self._connection.tell("reading begins anew", error)
                    if self._counts.read > read:
                        backoff = self._connection.backoff()
                    await asyncio.sleep(backoff.delay_s(time.monotonic()) or 0.0)
        finally:
            await self._connection.close()

    async def _read(self) -> None:
        """Reads on after the last message that was acknowledged, until something is wrong."""
        position = _Position(self._connection.breaks)
        reading = await self._begin()
        acknowledging = asyncio.create_task(self._acknowledge(position))
        try:
            while not acknowledging.done():
                await self._store.room()
                await self._read_some(reading, position)
            acknowledging.result()
        finally:
            acknowledging.cancel()
            await asyncio.gather(acknowledging, return_exceptions=True)
            with suppress(NatsError):
                await reading.unsubscribe()

    async def _read_some(
        self, reading: JetStreamContext.PullSubscription, position: _Position
    ) -> None:
        try:
            messages = await reading.fetch(self.settings.fetch, timeout=_FETCH_S)
        except asyncio.CancelledError as error:
            # nats-py cancels readers when it gives up a connection.
            task = asyncio.current_task()
            if task and task.cancelling():
                raise
            raise OutOfOrderError("the connection was given up") from error
        except NatsTimeoutError:
            await self._connection.up()
            await reading.consumer_info()  # raises where the server does not have it any more
            messages = []
        if self._connection.breaks > position.breaks:
            raise OutOfOrderError("what was under way when the connection broke is lost")
        if not messages:
            return
        for message in messages:
            sequence = message.metadata.sequence
            if position.order.is_new(sequence.stream, sequence.consumer):
                self._take(message)
            position.last = message
        self._counts.lag = messages[-1].metadata.num_pending
        position.moved.set()

    async def _acknowledge(self, position: _Position) -> None:
        """Acknowledges what is durable, with all that came before it."""
        while True:
            await position.moved.wait()
            position.moved.clear()
            last, ended = position.last, self.inbox.ended()
            await self._store.stored()
            if last:
                await last.ack()
            self.inbox.forget(ended)

    def _take(self, message: Msg) -> None:
        self._counts.read += 1
        self._counts.bytes += len(message.data)
        try:
            told = envelope.told_of(message.headers)
            gap, seen = envelope.gap_of(message.headers), envelope.seen_of(message.headers)
        except msgspec.MsgspecError as error:
            self._connection.tell("a message that is no delivery is left out", error)
            return
        if gap:
            self._store.gap(gap)
        if seen:
            self._store.agent_seen(seen)
        if told and (delivery := self.inbox.take(told, message.data)):
            self._store.put(delivery)

    async def _begin(self) -> JetStreamContext.PullSubscription:
        """The consumer, made anew after the last message that it acknowledged. What the server had
        sent, and nobody acknowledged, would otherwise come minutes later, after newer messages.

        If this process dies before it is made again, the next one reads from the beginning, and the
        store leaves out what it has.
        """
        settings, stream = self.settings, self._connection.stream
        self._counts.begun += 1
        try:
            state = (await stream.stream_info(settings.stream)).state
        except NotFoundError:
            await self._connection.ensure_stream()
            state = (await stream.stream_info(settings.stream)).state
        acknowledged = 0
        try:
            before = await stream.consumer_info(settings.stream, settings.consumer)
            acknowledged = before.ack_floor.stream_seq if before.ack_floor else 0
            await stream.delete_consumer(settings.stream, settings.consumer)
        except NotFoundError:
            pass
        if acknowledged > state.last_seq:  # the stream was made anew, or has lost its end
            acknowledged = 0
        config = ConsumerConfig(
            durable_name=settings.consumer,
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=acknowledged + 1,
            ack_policy=AckPolicy.ALL,
            ack_wait=settings.ack_wait_s,
            max_ack_pending=_MOST_UNACKNOWLEDGED,
            filter_subject=self._filters[0] if len(self._filters) == 1 else None,
            filter_subjects=self._filters if len(self._filters) > 1 else None,
        )
        await stream.add_consumer(settings.stream, config)
        return await stream.pull_subscribe_bind(settings.consumer, settings.stream)
