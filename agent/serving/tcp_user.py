"""The user behind a TCP connection from this machine, by the kernel's word (sock_diag(7))."""

from __future__ import annotations

import socket
import struct
from typing import Final

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_ANY_STATE: Final = 0xFFFFFFFF
_ANY_COOKIE: Final = 0xFFFFFFFF
_ANSWER_BYTES: Final = 4096
_PATIENCE_S: Final = 0.1  # the kernel answers before `send` returns

_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
# struct inet_diag_req_v2: family, protocol, states, then struct inet_diag_sockid.
_REQUEST: Final = struct.Struct("=BBxxI4s16s16sIII")
_PORTS: Final = struct.Struct(">HH")
_USER: Final = struct.Struct("=64xII")  # of struct inet_diag_msg: the user and the inode


def user_of(accepted: socket.socket) -> int | None:
    """The id of the user that owns the other end of ACCEPTED. None where it is not on this machine,
    or closed, or where the kernel does not say."""
    ours, theirs = accepted.getsockname(), accepted.getpeername()
    family = accepted.family
    request = _REQUEST.pack(
        family,
        socket.IPPROTO_TCP,
        _ANY_STATE,
        _PORTS.pack(theirs[1], ours[1]),
        socket.inet_pton(family, theirs[0]),
        socket.inet_pton(family, ours[0]),
        0,
        _ANY_COOKIE,
        _ANY_COOKIE,
    )
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(_PATIENCE_S)
            netlink.send(header + request)
            answer = netlink.recv(_ANSWER_BYTES)
    except OSError:
        return None
    if len(answer) < _HEADER.size + _USER.size:
        return None
    _, kind, *_ = _HEADER.unpack_from(answer)
    user, inode = _USER.unpack_from(answer, _HEADER.size)
    # The kernel says user 0 of a socket that no process has any more; it has no inode.
    return user if kind == _SOCK_DIAG_BY_FAMILY and inode else None
