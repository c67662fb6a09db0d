"""Where the server listens: a socket's path that no other agent holds, or a loopback address."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
from pathlib import Path

from coral.agent.config import MAX_PORT, ConfigError


class UnixSocket:
    """A socket's path, held by a lock: a second server on a live path would bind without a word."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            self._lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except PermissionError as error:
            raise ConfigError(
                f"listen: unix:{path}: user {os.geteuid()} may not write {path}.lock: give it "
                f"{path.parent} and what is in it"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ConfigError(f"listen: unix:{path}: another agent is listening there") from error
        path.unlink(missing_ok=True)

    def owner_only(self) -> _Umask:
        """While it lasts, sockets are made for their owner alone (0600)."""
        return _Umask(0o177)

    def release(self) -> None:
        """Removes the path and lets another agent have it."""
        self._path.unlink(missing_ok=True)
        os.close(self._lock)


class _Umask:
    def __init__(self, mask: int) -> None:
        self._mask = mask

    def __enter__(self) -> None:
        self._before = os.umask(self._mask)

    def __exit__(self, *_: object) -> None:
        os.umask(self._before)


def loopback_host(address: str) -> str:
    """The host of ADDRESS, if it is this machine's own. Raises `ConfigError`."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > MAX_PORT:
        raise ConfigError(f"listen: {address!r} is not accepted; give unix:PATH or 127.0.0.1:PORT")
    plain = host.strip("[]")
    try:
        found = {info[4][0] for info in socket.getaddrinfo(plain, None)}
    except OSError as error:
        raise ConfigError(f"listen: {address!r}: {error}") from error
    if not plain or not all(ipaddress.ip_address(a).is_loopback for a in found):
        raise ConfigError(
            f"listen: {address!r} is beyond loopback, and there is no TLS yet: anybody who reaches "
            "it could start collectors; give 127.0.0.1:PORT or unix:PATH"
        )
    return host
