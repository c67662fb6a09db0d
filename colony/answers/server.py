"""The colony's gRPC server: a unix socket for its owner, TCP with TLS and tokens for others."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import grpc
import structlog

from coral.colony.answers.access import Access, Role
from coral.colony.answers.elsewhere import StoresNothing
from coral.colony.answers.service import Fleet, Service
from coral.colony.answers.settings import Serving, ServingTls
from coral.colony.answers.sources import Reads
from coral.wire.settings.files import read_regular

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

_GRACE_S: Final = 1.0
_MOST_MESSAGE: Final = 4 << 20
_MOST_PEM_BYTES: Final = 1 << 20  # a bundle of every public authority has 220 KB
_MOST_PATH_BYTES: Final = 107  # sun_path of unix(7), without its NUL
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", _MOST_MESSAGE),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)


class ServingError(ValueError):
    """An address cannot be served; the message begins with `listen` or `tls`."""


class Answers:
    """Answers questions about what STORE has; FLEET collects more."""

    def __init__(self, store: Reads, fleet: Fleet, serving: Serving) -> None:
        """Raises `ServingError`; ValueError for a token that cannot be read."""
        check(serving)
        anyone = Role.OPERATE if serving.insecure_loopback else Role.NONE
        self._serving = serving
        self._has_rows = not isinstance(store, StoresNothing)
        self._service = Service(store, fleet, Access(serving.tokens, anyone), serving.limits)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[list[str]]:
        """Serves for the duration of the block; gives the addresses, with the ports that were
        taken. Raises `ServingError`."""
        server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=256)
        server.add_generic_rpc_handlers((self._service.handlers(),))
        made: list[Path] = []
        try:
            addresses = [self._add(server, each, made) for each in self._serving.listen]
            await server.start()
            if self._has_rows:
                self._service.pool.warm_up()
            yield addresses
        finally:
            await server.stop(_GRACE_S)
            await self._service.pool.close()
            for path in made:
                with suppress(OSError):
                    path.unlink()

    def _add(self, server: grpc.aio.Server, address: str, made: list[Path]) -> str:
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            _make_way(path)
            before = os.umask(0o177)
            try:
                port = _bound(server, f"unix:{path}", None)
            finally:
                os.umask(before)
            if not port:
                raise ServingError(f"listen: {address}: it cannot be bound")
            made.append(path)
            return address
        host = address.rpartition(":")[0]
        port = _bound(server, address, self._serving.tls)
        if not port:
            raise ServingError(f"listen: {address}: it cannot be bound; is it taken?")
        return f"{host}:{port}"


def _bound(server: grpc.aio.Server, address: str, tls: ServingTls | None) -> int:
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, _credentials(tls))
    except RuntimeError:
        return 0


def _credentials(tls: ServingTls) -> grpc.ServerCredentials:
    """gRPC's. The files are read again for each new connection."""
    last = first = _configuration(tls)
    told = ""

    def fetch() -> grpc.ServerCertificateConfiguration:
        nonlocal last, told
        try:
            last, told = _configuration(tls), ""
        except ServingError as error:
            if str(error) != told:  # strangers decide how often
                told = str(error)
                log.warning("the last certificate stays in force", reason=told)
        return last

    return grpc.dynamic_ssl_server_credentials(
        first, fetch, require_client_authentication=tls.client_ca is not None
    )


def _configuration(tls: ServingTls) -> grpc.ServerCertificateConfiguration:
    def read(name: str, path: Path, *, secret: bool = False) -> bytes:
        try:
            return read_regular(path, _MOST_PEM_BYTES, secret=secret)
        except OSError as error:
            raise ServingError(f"tls.{name}: {path}: {error.strerror}") from error

    pair = read("key", tls.key, secret=True), read("certificate", tls.certificate)
    authorities = read("client_ca", tls.client_ca) if tls.client_ca else None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certificate, tls.key, "")
    except (ssl.SSLError, OSError) as error:
        raise ServingError(
            f"tls.certificate: {tls.certificate}: with {tls.key} it is no pair in PEM: {error}"
        ) from error
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=authorities)


def check(serving: Serving) -> None:
    """Refuses a port at which anybody could ask, or listen to others that do. Raises
    `ServingError`."""
    for address in serving.listen:
        if address.startswith("unix:"):
            path = address.removeprefix("unix:")
            if not path.startswith("/") or len(os.fsencode(path)) > _MOST_PATH_BYTES:
                raise ServingError(
                    f"listen: {address}: give an absolute path of at most {_MOST_PATH_BYTES} bytes"
                )
            continue
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:  # noqa: PLR2004
            raise ServingError(f"listen: {address!r} is not accepted; give HOST:PORT or unix:PATH")
        if not serving.tls and not _is_loopback(host):
            raise ServingError(
                f"listen: {address} is beyond loopback, and without TLS whoever is on the way "
                "reads everything, tokens too: set tls.certificate and tls.key"
            )
        if serving.tokens or (_is_loopback(host) and serving.insecure_loopback):
            continue
        raise ServingError(
            f"listen: {address}: without tokens nobody could ask here: set tokens, or, on "
            "loopback, let every local user ask by insecure_loopback"
        )
    if serving.insecure_loopback and not all(
        each.startswith("unix:") or _is_loopback(each.rpartition(":")[0]) for each in serving.listen
    ):
        raise ServingError("listen: insecure_loopback is for addresses on loopback alone")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _make_way(path: Path) -> None:
    """Removes the socket of a colony that has ended. Raises `ServingError` where one answers, and
    where others could put a socket there."""
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if path.parent.stat().st_mode & _OTHERS_WRITE and not _is_sticky(path.parent):
            raise ServingError(f"listen: unix:{path}: others may write its directory")
        if not path.exists():
            return
        if not path.is_socket():
            raise ServingError(f"listen: unix:{path}: there is something that is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            found = probe.connect_ex(str(path))
        if found not in (errno.ECONNREFUSED, errno.ENOENT):
            raise ServingError(f"listen: unix:{path}: another colony answers there")
        path.unlink()
    except OSError as error:
        raise ServingError(f"listen: unix:{path}: {error.strerror or error}") from error


def _is_sticky(directory: Path) -> bool:
    return bool(directory.stat().st_mode & stat.S_ISVTX)
