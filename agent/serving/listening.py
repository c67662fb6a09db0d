"""Where the agent listens: unix sockets' paths that no other agent holds, and TCP ports, which are
on loopback or have TLS.

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

from coral.agent.addresses import ACCEPTED, UnixAddress, is_unix, unix_address
from coral.agent.caller import Trust
from coral.agent.config import MAX_PORT, Config, ConfigError
from coral.agent.serving.certificates import Certificate
from coral.agent.serving.rotation import Rotation
from coral.agent.serving.tcp_user import user_of

_BACKLOG: Final = 512
_UCRED: Final = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED, unix(7)
_SO_PEERGROUPS: Final = 59  # asm-generic/socket.h
_GID: Final = struct.Struct("I")
_MOST_GROUPS: Final = 256  # Python's getsockopt(2) reads at most 1,024 bytes
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_SITE_BITS: Final = 64  # of an IPv6 address: one machine may have all that begin alike, RFC 7707
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
    """Who the other end is, by the kernel's word or its certificate's: `uid:0`, `gid:0` for each of
    its groups, `socket:admin`; `spiffe://td/path`, `subject:CN=colony,O=shop`, `dns:host`."""
    certificate: Certificate | None = None
    """The one that it proved to hold the key of, over TLS."""


class Listener(Protocol):
    """A configured address."""

    kind: str
    """`unix` or `tcp`: those of one kind share a gRPC server, and the limits."""
    address: str
    """As it was configured, without options, with the port that was taken."""
    tls: Rotation | None
    """What connections are encrypted with; None: they are not."""

    @property
    def sockets(self) -> Sequence[socket.socket]:
        """They listen, and do not block."""

    def origin(self, accepted: socket.socket) -> Origin:
        """Where a connection comes from. Raises OSError where it is gone."""

    def close(self) -> None:
        """Stops listening, and lets another agent have the address. Safe to call twice."""


def listen(config: Config, *, has_token: bool, tls: Rotation | None = None) -> list[Listener]:
    """Binds every configured address; all TCP ports have TLS, if any. Raises `ConfigError`, with
    none of them bound."""
    listeners: list[Listener] = []
    try:
        for address in config.listen:
            if address in config.listen[: len(listeners)] and not address.endswith(":0"):
                raise ConfigError(f"listen: {address} is given twice; give each address once")
            if is_unix(address):
                listeners.append(UnixListener(_unix(address)))
                continue
            host, port = _host_and_port(address)
            _check_safe(config, address, host, has_token=has_token)
            listeners.append(TcpListener(address, host, port, tls))
    except ConfigError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _check_safe(config: Config, address: str, host: str, *, has_token: bool) -> None:
    """Refuses a port at which anybody could use the agent, or listen to others that do."""
    is_local = _is_loopback(host)
    if not (is_local or config.tls.certificate or config.tls.insecure_plaintext):
        raise ConfigError(
            f"listen: {address!r} is beyond loopback, and without TLS whoever is on the way reads "
            "and changes everything, tokens too: set tls.certificate and tls.key, or accept that "
            "with tls.insecure_plaintext: true"
        )
    if has_token or (config.tls.certificate and config.tls.client_certificates == "require"):
        return
    if not is_local:
        raise ConfigError(
            f"listen: {address}: without a token or certificates of clients, whoever reaches it "
            "could trace what this agent can: set tls.client_ca, or auth.token_file"
        )
    if not config.auth.insecure_loopback:
        raise ConfigError(
            f"listen: {address}: without a token, every local user could trace what this agent "
            "can: set auth.token_file, or accept that with auth.insecure_loopback: true"
        )


class UnixListener:
    """A socket's path, held by a lock: two agents that start at a time would both find it free."""

    kind = "unix"

    tls: Rotation | None = None

    def __init__(self, wanted: UnixAddress) -> None:
        path = self._path = wanted.path
        self.address = f"unix:{path}"
        self.name = wanted.name
        self._wanted = wanted
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
        umask = os.umask(0o177)  # for its owner alone, until it is what it should be
        try:
            bound.bind(str(self._path))
            self._open_to_others()
            bound.listen(_BACKLOG)
        except (OSError, ConfigError):
            bound.close()
            raise
        finally:
            os.umask(umask)
        bound.setblocking(False)
        return bound

    def _open_to_others(self) -> None:
        try:
            gid = self._wanted.gid
            if gid >= 0:
                os.chown(self._path, -1, gid)
        except ValueError as error:
            raise ConfigError(f"listen: {error}") from error
        except PermissionError as error:
            raise ConfigError(
                f"listen: {self.address}: user {os.geteuid()} may not give the socket to the group "
                f"{self._wanted.group}: start the agent as root, or as a member of it"
            ) from error
        self._path.chmod(self._wanted.mode)

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
        groups = dict.fromkeys((gid, *_groups(accepted)))
        names = (f"uid:{uid}", *(f"gid:{each}" for each in groups), f"socket:{self.name}")
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
    """A port. A second agent on it fails: SO_REUSEPORT is not set."""

    kind = "tcp"

    def __init__(self, address: str, host: str, port: int, tls: Rotation | None = None) -> None:
        self.tls = tls
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
        addresses a connection comes from: every user may bind all of 127.0.0.0/8. So is a network
        of IPv6, in which a machine can choose its address."""
        ip, port, *_ = accepted.getpeername()
        address = f"ipv6:[{ip}]:{port}" if ":" in ip else f"ipv4:{ip}:{port}"
        if (user := user_of(accepted)) is not None:
            principal = f"uid {user}"
        else:
            principal = _LOOPBACK if ipaddress.ip_address(ip).is_loopback else _site(ip)
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


def _groups(accepted: socket.socket) -> tuple[int, ...]:
    """The supplementary groups of the process that connected, by SO_PEERGROUPS of Linux 4.13."""
    try:
        raw = accepted.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * _GID.size)
    except OSError:
        return ()
    return tuple(gid for (gid,) in _GID.iter_unpack(raw))


def _inode(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _resolved(host: str) -> list[str]:
    plain = host.strip("[]")
    return sorted({str(info[4][0]) for info in socket.getaddrinfo(plain, None)})


def _site(ip: str) -> str:
    """What one machine's addresses have in common."""
    if ":" not in ip:
        return ip
    plain, _, _ = ip.partition("%")
    return str(ipaddress.ip_network((plain, _SITE_BITS), strict=False))


def _unix(address: str) -> UnixAddress:
    """The unix socket ADDRESS. Raises `ConfigError`."""
    try:
        return unix_address(address)
    except ValueError as error:
        raise ConfigError(f"listen: {error}") from error


def _host_and_port(address: str) -> tuple[str, int]:
    """The host and port of ADDRESS, where the host is known. Raises `ConfigError`."""
    host, colon, port = address.rpartition(":")
    if not colon or not host.strip("[]") or not port.isdigit() or int(port) > MAX_PORT:
        raise ConfigError(f"listen: {address!r} is not accepted; {ACCEPTED}")
    try:
        _resolved(host)
    except OSError as error:
        raise ConfigError(
            f"listen: {address!r}: the host {host!r} is not known ({error.strerror}); {ACCEPTED}"
        ) from error
    return host, int(port)


def _is_loopback(host: str) -> bool:
    return all(ipaddress.ip_address(each).is_loopback for each in _resolved(host))
