"""Credentials that follow their files: re-read when those change, the last good ones kept."""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, Generic, TypeVar

import structlog

from coral.agent.config import Config, ConfigError
from coral.agent.serving.certificates import Distrusted
from coral.agent.serving.counts import TlsCounts
from coral.agent.serving.credentials import Credentials, CredentialsError, Source, Sources, load
from coral.agent.sessions.background import keep_going
from coral.collectors.runner import in_thread

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.tls")

_EVERY_S: Final = 0.25
_AGAIN_S: Final = 60.0  # whatever the files look like, after a failure

T = TypeVar("T")
Signature = tuple[tuple[int, ...], ...]


class Watched(ABC, Generic[T]):
    """What was read from files that change, of the LISTENER `grpc` or `metrics`."""

    def __init__(self, listener: str) -> None:
        self.listener = listener
        self.counts = TlsCounts()
        self._seen: Signature = ()
        self._failed_at_s: float | None = None

    @property
    @abstractmethod
    def paths(self) -> tuple[Path, ...]:
        """The files."""

    @abstractmethod
    def read(self) -> T:
        """Reads and checks them. Blocks. Raises `CredentialsError`."""

    @abstractmethod
    def use(self, read: T) -> None:
        """Uses what was READ from now on."""

    @asynccontextmanager
    async def kept_up(self) -> AsyncIterator[None]:
        """Inside the block the files are looked at four times a second."""
        for path in self.paths:
            if not os.access(path, os.R_OK):
                log.warning(
                    "a file of TLS cannot be read again by the user that the agent has become: it "
                    "will not see a new one",
                    file=str(path), uid=os.geteuid(),
                )  # fmt: skip
        task = asyncio.create_task(keep_going(f"tls {self.listener}", self._keep_up))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            if self.is_due():
                # In a thread: a signature with RSA's key takes a millisecond or more.
                self.take(await in_thread(self.try_to_read))

    def is_due(self) -> bool:
        """Whether the files have changed since they were read, or should be tried again."""
        seen = signature(self.paths)
        again = self._failed_at_s is not None and time.monotonic() > self._failed_at_s + _AGAIN_S
        if seen == self._seen and not again:
            return False
        self._seen = seen  # before the files are read: a change meanwhile is another one
        return True

    def try_to_read(self) -> T | CredentialsError:
        """What the files have now, or what is wrong with them."""
        try:
            return self.read()
        except CredentialsError as error:
            return error

    def take(self, found: T | CredentialsError) -> None:
        """Uses what was FOUND; after an error, goes on with what was good before."""
        if isinstance(found, CredentialsError):
            self._failed_at_s = time.monotonic()
            self.counts.failures += 1
            log.error(
                "changed files of TLS are not used", listener=self.listener, reason=str(found)
            )
            return
        self._failed_at_s = None
        self.counts.reloads += 1
        self.use(found)


class Rotation(Watched[Credentials]):
    """The credentials that SOURCES have."""

    def __init__(self, listener: str, sources: Sources) -> None:
        """Raises `CredentialsError`."""
        super().__init__(listener)
        self.sources = sources
        self.is_due()
        self.current = self.read()
        self.counts.expiries_s = dict(self.current.expiries_s)
        self.changed: Callable[[Distrusted], None] = _ignore
        """Called with what is trusted no more, after each change."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files."""
        return self.sources.paths

    def read(self) -> Credentials:
        """Reads and checks them. Raises `CredentialsError`."""
        return load(self.sources)

    def use(self, read: Credentials) -> None:
        """New connections are made with what was READ."""
        distrusted = read.distrusted_since(self.current)
        self.current = read
        self.counts.expiries_s = dict(read.expiries_s)
        log.info(
            "files of TLS were read again", listener=self.listener, serial=read.serial,
            authorities=len(read.authorities), removed=len(distrusted.authorities),
            revoked=len(read.revoked),
        )  # fmt: skip
        self.changed(distrusted)


def signature(paths: tuple[Path, ...]) -> Signature:
    """What changes when the files at PATHS do, through symbolic links too: Kubernetes replaces the
    link to the directory that all files of a volume are in."""
    found = []
    for path in paths:
        stats: tuple[int, ...] = ()
        with suppress(OSError):
            stat = path.stat()
            stats = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        found.append(stats)
    return tuple(found)


def _ignore(_distrusted: Distrusted) -> None:
    """No connection depends on what is trusted."""


def read_tls(config: Config) -> Rotation | None:
    """The credentials of gRPC over TCP, if CONFIG names any. Raises `ConfigError`."""
    tls = config.tls
    if not tls.certificate:
        return None
    sources = Sources(
        Source("tls.certificate", Path(tls.certificate)),
        Source("tls.key", Path(tls.key)),
        Source("tls.client_ca", Path(tls.client_ca)) if tls.client_ca else None,
        tls.client_certificates,
        protocols=("h2",),
        client_crl=Source("tls.client_crl", Path(tls.client_crl)) if tls.client_crl else None,
    )
    try:
        return Rotation("grpc", sources)
    except CredentialsError as error:
        raise ConfigError(str(error)) from error
