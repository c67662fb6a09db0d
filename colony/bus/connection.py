"""One connection to NATS that comes back by itself, and the stream."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import structlog
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import (
    DiscardPolicy,
    RawStreamMsg,
    RetentionPolicy,
    StorageType,
    StoreCompression,
    StreamConfig,
)
from nats.js.errors import APIError, BadRequestError, NotFoundError, ServerError

from coral.client import Retry
from coral.client.backoff import Backoff
from coral.colony.bus import subjects
from coral.colony.bus.secured import SecretsError, SecuredClient, check, words_of
from coral.colony.bus.settings import BusSettings
from coral.colony.delivery import EndedError

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

FAILURES: Final = (NatsError, OSError, TimeoutError, EOFError)
"""What may pass when it is tried again."""

_CONNECT_S: Final = 5
_RECONNECT_S: Final = 0.5
_TELL_AGAIN_S: Final = 60.0
_DUPLICATES_S: Final = 120.0  # as long as the server remembers ids by default
# "Wrong last sequence", with and without the number that the stream has.
_WRONG_SEQUENCE: Final = frozenset({10071, 10164})


class BusError(EndedError):
    """The bus cannot be used as it is configured."""


class Connection:
    """The connection of SETTINGS. `open` comes first."""

    def __init__(self, settings: BusSettings, name: str) -> None:
        self.settings = settings
        self._name = name
        self.client = Client()
        self._connected = asyncio.Event()
        self.breaks = 0
        self._told = ("", "")
        self._tell_again_s = 0.0
        self._is_over = False
        self._opening: asyncio.Task[None] | None = None

    @property
    def stream(self) -> JetStreamContext:
        """JetStream's interface."""
        return self.client.jetstream(timeout=self.settings.timeout_s)

    @property
    def is_up(self) -> bool:
        """Whether there is a connection now."""
        return self._connected.is_set()

    async def open(self) -> None:
        """Returns when the stream is there, however long that takes. Raises `BusError`."""
        try:
            check(self.settings)
        except SecretsError as error:
            raise BusError(str(error)) from error
        await self._open()

    async def _open(self) -> None:
        backoff = self.backoff()
        while True:
            try:
                if not self.is_up:
                    await self._connect()
                    self._connected.set()
                await self.ensure_stream()
            except FAILURES as error:
                self.tell("the bus does not answer", error)
                await asyncio.sleep(backoff.delay_s(time.monotonic()) or 0.0)
            else:
                return

    async def close(self) -> None:
        """Ends the connection. What waits to be sent is not sent."""
        self._connected.clear()
        self._is_over = True
        if self._opening:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        if isinstance(self.client, SecuredClient):  # one that has begun to connect
            await self.client.close()

    async def up(self) -> None:
        """Returns when there is a connection."""
        await self._connected.wait()

    def backoff(self) -> Backoff:
        """For what is tried until it succeeds."""
        retry = Retry(float("inf"), first_delay_s=0.1, max_delay_s=self.settings.most_retry_s)
        return Backoff(retry)

    def tell(self, what: str, error: BaseException) -> None:
        """Logs a failure: the same one again only after a minute, because all that is under way
        fails with it, and is tried again and again."""
        reason, now_s = words_of(error, self.settings), time.monotonic()
        if (what, reason) != self._told or now_s > self._tell_again_s:
            self._told, self._tell_again_s = (what, reason), now_s + _TELL_AGAIN_S
            log.warning(what, reason=reason)

    async def ensure_stream(self) -> None:
        """Makes the stream if it is not there. Raises `BusError`, and what may pass."""
        settings = self.settings
        try:
            info = await self.stream.stream_info(settings.stream)
        except NotFoundError:
            wanted = StreamConfig(
                name=settings.stream,
                subjects=[subjects.everything(settings.prefix)],
                retention=RetentionPolicy.LIMITS,
                discard=DiscardPolicy.OLD,
                storage=StorageType.FILE,
                max_age=settings.max_age_s,
                max_bytes=settings.max_bytes,
                num_replicas=settings.replicas,
                duplicate_window=min(_DUPLICATES_S, settings.max_age_s),
                allow_direct=True,
                compression=StoreCompression.S2,
            )
            try:
                await self.stream.add_stream(wanted)
            except (BadRequestError, ServerError) as error:
                raise BusError(
                    f"stream {settings.stream} cannot be made: {error.description}; its limit "
                    f"would be {settings.max_bytes:,} bytes"
                ) from error
            log.info("stream made", stream=settings.stream, max_bytes=settings.max_bytes)
            return
        everything = subjects.everything(settings.prefix)
        if everything not in (info.config.subjects or ()):
            raise BusError(
                f"stream {settings.stream}: it is there, and has not the subjects {everything}"
            )

    async def last_of(self, subject: str) -> RawStreamMsg | None:
        """The last message with that subject."""
        try:
            return await self.stream.get_last_msg(self.settings.stream, subject)
        except NotFoundError:
            return None

    async def _connect(self) -> None:
        settings = self.settings
        self.client = SecuredClient(settings)
        await self.client.connect(
            list(settings.servers),
            name=self._name,
            connect_timeout=_CONNECT_S,
            reconnect_time_wait=_RECONNECT_S,  # type: ignore[arg-type]  # it is slept
            max_reconnect_attempts=-1,
            ping_interval=10,
            max_outstanding_pings=2,
            disconnected_cb=self._lost,
            reconnected_cb=self._back,
            closed_cb=self._closed,
            error_cb=self._fails,
        )

    async def _lost(self) -> None:
        if self._connected.is_set():
            self._connected.clear()
            self.breaks += 1
            log.warning("the connection to the bus is lost")

    async def _closed(self) -> None:
        """nats-py gives up a connection that the server ended because its user is not accepted any
        more, such as one that has expired. The files may have a newer one."""
        if not self._is_over:
            self._opening = asyncio.create_task(self._open())

    async def _fails(self, error: Exception) -> None:
        """nats-py tells of every try to connect."""
        if not self.is_up:
            self.tell("the bus does not answer", error)

    async def _back(self) -> None:
        self._connected.set()
        log.info("the connection to the bus is back")


def is_wrong_sequence(error: APIError) -> bool:
    """Whether a message was refused because it does not follow on the last of its subject."""
    return error.err_code in _WRONG_SEQUENCE
