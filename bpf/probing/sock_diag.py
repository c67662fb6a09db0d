"""NETLINK_SOCK_DIAG: the kernel's own list of TCP sockets, with the figures of each, as arrays.

By hand, as pyroute2 takes seventy times as long and as much memory to make objects of 10,000
sockets as this to make an array, and answers "no sockets" where the kernel refuses.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST_DUMP: Final = 0x301
_INET_DIAG_INFO, _INET_DIAG_SKMEMINFO = 2, 7
_ALL_STATES: Final = 0xFFF
_CLONE_NEWNET: Final = 0x40000000
_READ_BYTES: Final = 1 << 16
_PATIENCE_S: Final = 5.0

_HEADER: Final = struct.Struct("=IHHII")
_REQUEST: Final = struct.Struct("=BBBxI48x")
_ATTRIBUTE: Final = struct.Struct("=HH")
_ERROR: Final = struct.Struct("=i")
_INODE: Final = struct.Struct("=68xI")

# struct inet_diag_msg, and the used members of struct tcp_info, which only grows at its end.
_MESSAGE: Final = np.dtype(
    [
        ("family", "u1"), ("state", "u1"), ("timer", "u1"), ("again", "u1"), ("local_port", ">u2"),
        ("remote_port", ">u2"), ("local", "V16"), ("remote", "V16"), ("interface", "u4"),
        ("cookie", "u8"), ("expires", "u4"), ("unread", "u4"), ("unacked", "u4"), ("uid", "u4"),
        ("inode", "u4"),
    ]
)  # fmt: skip
_INFO_FIELDS: Final = {
    "mss": (16, "u4"), "rtt_us": (68, "u4"), "rtt_variation_us": (72, "u4"),
    "slow_start_threshold": (76, "u4"), "congestion_window": (80, "u4"),
    "retransmits": (100, "u4"), "bytes_acked": (120, "u8"), "bytes_received": (128, "u8"),
    "segments_sent": (136, "u4"), "segments_received": (140, "u4"), "unsent": (144, "u4"),
    "rtt_min_us": (148, "u4"), "bytes_sent": (200, "u8"), "bytes_retransmitted": (208, "u8"),
}  # fmt: skip
_INFO_BYTES: Final = 216  # Linux 4.19
_INFO: Final = np.dtype(
    {
        "names": list(_INFO_FIELDS),
        "offsets": [at for at, _ in _INFO_FIELDS.values()],
        "formats": [kind for _, kind in _INFO_FIELDS.values()],
        "itemsize": _INFO_BYTES,
    }
)
_DROPS: Final = struct.Struct("=32xI")  # of INET_DIAG_SKMEMINFO (Linux 4.7): SK_MEMINFO_DROPS
SOCKET: Final = np.dtype([("socket", _MESSAGE), ("info", _INFO), ("drops", "u4")])


def tcp_sockets(
    inodes: Container[int] | None = None, namespace: Path | None = None
) -> NDArray[Any]:
    """The TCP sockets, all or those with INODES, as `SOCKET`s of shape (n,), including listeners.
    One that moves in the kernel's table meanwhile may be missing, or come twice.
    They belong to the network NAMESPACE, a file, or to that of this process. Raises OSError."""
    if namespace is None:
        return _tcp_sockets(inodes)
    with namespace.open("rb") as file, ThreadPoolExecutor(1) as thread:
        return thread.submit(_tcp_sockets_of, inodes, file.fileno()).result()


def _tcp_sockets_of(inodes: Container[int] | None, namespace_fd: int) -> NDArray[Any]:
    """In a thread of its own, because a namespace can be entered by a single thread."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace_fd, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
    return _tcp_sockets(inodes)


def _tcp_sockets(inodes: Container[int] | None) -> NDArray[Any]:
    parts = [*_dump(socket.AF_INET, inodes)]
    with suppress(FileNotFoundError):  # a kernel without IPv6
        parts += _dump(socket.AF_INET6, inodes)
    return np.frombuffer(b"".join(parts), SOCKET)


def try_it() -> None:
    """Requests no socket at all. Raises OSError if the kernel does not answer."""
    list(_dump(socket.AF_INET, (), states=0))


def _dump(family: int, inodes: Container[int] | None, states: int = _ALL_STATES) -> Iterator[bytes]:
    """The wanted sockets, each as the bytes of a `SOCKET`."""
    wanted_parts = 1 << _INET_DIAG_INFO - 1 | 1 << _INET_DIAG_SKMEMINFO - 1
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, wanted_parts, states)
    header = _HEADER.pack(
        _HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(_PATIENCE_S)
        netlink.send(header + request)
        while True:
            answer, at = netlink.recv(_READ_BYTES), 0
            while at < len(answer):
                size, kind, *_ = _HEADER.unpack_from(answer, at)
                body = at + _HEADER.size
                if kind == _NLMSG_ERROR or (kind == _NLMSG_DONE and size > _HEADER.size):
                    (error,) = _ERROR.unpack_from(answer, body)
                    if error:
                        raise OSError(-error, f"sock_diag: {os.strerror(-error)}")
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    return
                wanted = inodes is None or _INODE.unpack_from(answer, body)[0] in inodes
                if wanted and kind == _SOCK_DIAG_BY_FAMILY:
                    yield _one(answer, body, at + size)
                at += size + 3 & ~3


def _one(answer: bytes, at: int, end: int) -> bytes:
    """The `SOCKET` of the message in ANSWER; figures that an older kernel does not report are zero.
    Empty for requests and TIME_WAIT entries, which are no full sockets."""
    message, info, drops = answer[at : at + _MESSAGE.itemsize], b"", 0
    at += _MESSAGE.itemsize
    while at + _ATTRIBUTE.size <= end:
        size, kind = _ATTRIBUTE.unpack_from(answer, at)
        if size < _ATTRIBUTE.size:
            raise OSError(errno.EBADMSG, "sock_diag: an attribute of no length")
        if kind == _INET_DIAG_INFO:
            info = answer[at + _ATTRIBUTE.size : at + size][:_INFO_BYTES]
        elif kind == _INET_DIAG_SKMEMINFO and size >= _ATTRIBUTE.size + _DROPS.size:
            (drops,) = _DROPS.unpack_from(answer, at + _ATTRIBUTE.size)
        at += size + 3 & ~3
    if not info:
        return b""
    return message + info.ljust(_INFO_BYTES, b"\0") + drops.to_bytes(4, sys.byteorder)
