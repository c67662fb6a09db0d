"""Where the agent listens: unix sockets' paths that no other agent holds, and loopback addresses.

A listener is an object with sockets that accept, and that says of each accepted connection where it
comes from. It knows nothing of gRPC.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import socket
import stat
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from coral.agent.caller import Trust
from coral.agent.config import MAX_PORT, Config, ConfigError
from coral.agent.serving.tcp_user import user_of

_BACKLOG: Final = 512
_UCRED: Final = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED, unix(7)
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_MOST_PATH_BYTES: Final = 107  # of `sun_path`, without the NUL that ends it, unix(7)
_ACCEPTED: Final = "give unix:PATH or 127.0.0.1:PORT"
_LOOPBACK: Final = "this machine"  # the principal of local connections whose user is not known


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a connection comes from. `address` is for people; connections with the same
    `principal` are one peer's."""

    address: str
    principal: str
    trust: Trust
    pid: int = 0
    """The process that connected by a unix socket; 0 for others, and for one that is hidden."""
    names: tuple[str, ...] = ()
    """What the connection itself proves of the caller, such as `uid:1000`, `socket:admin`."""


class Listener(Protocol):
    """A configured address."""

    kind: str
    """`unix` or `tcp`: those of one kind share a gRPC server, and the limits."""
    address: str
    """As it was configured, with the port that was taken."""

    @property
    def sockets(self) -> Sequence[socket.socket]:
        """They listen, and do not block."""

    def origin(self, accepted: socket.socket) -> Origin:
        """Where a connection comes from. Raises OSError where it is gone."""

    def close(self) -> None:
        """Stops listening, and lets another agent have the address. Safe to call twice."""


def listen(config: Config, *, has_token: bool) -> list[Listener]:
    """Binds every configured address. Raises `ConfigError`, with none of them bound."""
    listeners: list[Listener] = []
    try:
        for address in config.listen:
            if address in config.listen[: len(listeners)] and not address.endswith(":0"):
                raise ConfigError(f"listen: {address} is given twice; give each address once")
            if address.startswith("unix:"):
                listeners.append(UnixListener(_path(address)))
                continue
            host, port = _loopback(address)
            if not (has_token or config.auth.insecure_loopback):
                raise ConfigError(
                    f"listen: {address}: without a token, every local user could trace what this "
                    "agent can: set auth.token_file, or accept that with "
                    "auth.insecure_loopback: true"
                )
            listeners.append(TcpListener(address, host, port))
    except ConfigError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


class UnixListener:
    """A socket's path, held by a lock: two agents that start at a time would both find it free."""

    kind = "unix"

    def __init__(self, path: Path) -> None:
        self.address = f"unix:{path}"
        self._path = path
        self._lock = -1
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._check_directory()
            self._check_path()  # before there is a lock: a path that is refused is left as it is
            self._lock = self._locked()
            self._make_way()
            self.sockets: Sequence[socket.socket] = (self._bound(),)
            self._inode = _inode(path)
        except ConfigError:
            self._unlock()
            raise
        except OSError as error:
            self._unlock()
            raise ConfigError(f"listen: {self.address}: {error.strerror or error}") from error

    def _check_directory(self) -> None:
        """Whoever may write the directory could put another socket there, and answer for us."""
        directory = self._path.parent
        found = directory.stat()
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & _OTHERS_WRITE:
            owners = f"root or user {os.geteuid()}" if os.geteuid() else "root"
            raise ConfigError(
                f"listen: {self.address}: others than {owners} may write {directory}, and could "
                f"put their own socket there: choose a directory that belongs to {owners}, with "
                "mode 0755 or less"
            )

    def _locked(self) -> int:
        lock = Path(f"{self._path}.lock")
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(lock, flags, 0o600)
        except PermissionError as error:
            raise ConfigError(
                f"listen: {self.address}: user {os.geteuid()} may not write {lock}: give it "
                f"{lock.parent} and what is in it"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            raise self._in_the_way(lock, "a regular file") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise self._in_the_way(lock, "a regular file")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise self._is_taken() from error
        return descriptor

    def _make_way(self) -> None:
        """Removes the socket that an agent left which was killed, and nothing else."""
        if self._check_path():
            self._path.unlink()

    def _check_path(self) -> bool:
        """Whether there is a socket, at which nobody answers."""
        try:
            mode = self._path.lstat().st_mode
        except FileNotFoundError:
            return False
        if not stat.S_ISSOCK(mode):
            raise self._in_the_way(self._path, "a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            if probe.connect_ex(str(self._path)) != errno.ECONNREFUSED:
                raise self._is_taken()
        return True

    def _bound(self) -> socket.socket:
        bound = socket.socket(socket.AF_UNIX)
        umask = os.umask(0o177)  # for its owner alone
        try:
            bound.bind(str(self._path))
            bound.listen(_BACKLOG)
        except OSError:
            bound.close()
            raise
        finally:
            os.umask(umask)
        bound.setblocking(False)
        return bound

    def _is_taken(self) -> ConfigError:
        return ConfigError(f"listen: {self.address}: another agent is listening there")

    def _in_the_way(self, path: Path, wanted: str) -> ConfigError:
        return ConfigError(
            f"listen: {self.address}: {path} exists and is not {wanted}: it is left as it is; "
            "remove it, or choose another path"
        )

    def origin(self, accepted: socket.socket) -> Origin:
        """By the kernel's word on the process that connected."""
        raw = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, gid = _UCRED.unpack(raw)
        trust = Trust.OWNER if uid in (0, os.geteuid()) else Trust.ANYONE
        names = (f"uid:{uid}", f"gid:{gid}", "socket:admin")
        return Origin(f"unix: uid {uid}, pid {pid}", f"uid {uid}", trust, pid, names)

    def close(self) -> None:
        """Removes the path too, if it is still that of our socket."""
        for one in self.sockets:
            one.close()
        with suppress(OSError):
            if _inode(self._path) == self._inode:
                self._path.unlink()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class TcpListener:
    """A port on this machine's own addresses. A second agent on it fails: SO_REUSEPORT is not
    set."""

    kind = "tcp"

    def __init__(self, address: str, host: str, port: int) -> None:
        self.sockets: Sequence[socket.socket] = ()
        try:
            for ip in _resolved(host):
                self.sockets = (*self.sockets, _bound_tcp(ip, port))
                port = self.sockets[0].getsockname()[1]
        except OSError as error:
            self.close()
            raise ConfigError(
                f"listen: {address}: Failed to bind to address {address}: {error.strerror or error}"
            ) from error
        self.address = f"{host}:{port}"

    def origin(self, accepted: socket.socket) -> Origin:
        """By the address of the other end. A user of this machine is one peer, whichever of its
        addresses a connection comes from: every user may bind all of 127.0.0.0/8."""
        ip, port, *_ = accepted.getpeername()
        address = f"ipv6:[{ip}]:{port}" if ":" in ip else f"ipv4:{ip}:{port}"
        if (user := user_of(accepted)) is not None:
            principal = f"uid {user}"
        else:
            principal = _LOOPBACK if ipaddress.ip_address(ip).is_loopback else ip
        return Origin(address, principal, Trust.ANYONE)

    def close(self) -> None:
        """Frees the port."""
        for one in self.sockets:
            one.close()


def _bound_tcp(ip: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if bound.family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((ip, port))
        bound.listen(_BACKLOG)
    except OSError:
        bound.close()
        raise
    bound.setblocking(False)
    return bound


def _inode(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _resolved(host: str) -> list[str]:
    plain = host.strip("[]")
    return sorted({str(info[4][0]) for info in socket.getaddrinfo(plain, None)})


def _path(address: str) -> Path:
    """The path of the unix socket ADDRESS. Raises `ConfigError`."""
    path = address.removeprefix("unix:")
    if not path:
        raise ConfigError(f"listen: {address!r} has no path; {_ACCEPTED}")
    if (size_bytes := len(os.fsencode(path))) > _MOST_PATH_BYTES:
        raise ConfigError(
            f"listen: {address}: the path has {size_bytes} bytes; give at most {_MOST_PATH_BYTES}, "
            "the kernel's limit for the path of a unix socket"
        )
    return Path(path)


def _loopback(address: str) -> tuple[str, int]:
    """The host and port of ADDRESS, if it is this machine's own. Raises `ConfigError`."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > MAX_PORT:
        raise ConfigError(f"listen: {address!r} is not accepted; {_ACCEPTED}")
    try:
        found = _resolved(host)
    except OSError as error:
        raise ConfigError(
            f"listen: {address!r}: the host {host!r} is not known ({error.strerror}); {_ACCEPTED}"
        ) from error
    if not host.strip("[]") or not all(ipaddress.ip_address(a).is_loopback for a in found):
        raise ConfigError(
            f"listen: {address!r} is beyond loopback, and there is no TLS yet: anybody who reaches "
            "it could start collectors; give 127.0.0.1:PORT or unix:PATH"
        )
    return host, int(port)
