"""The processes behind listening TCP sockets, in every network namespace.

All processes that hold a socket are meant: a master passes it on to the workers that it forks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from coral.collectors.procfs import PROC

_LISTEN: Final = "0A"  # TCP_LISTEN of include/net/tcp_states.h
_STATE, _INODE = 3, 9  # columns of /proc/net/tcp
_SOCKET: Final = re.compile(r"socket:\[(\d+)\]")
# A process may end, or its files may be hidden from this agent (CAP_SYS_PTRACE).
_HIDDEN: Final = (FileNotFoundError, ProcessLookupError, PermissionError)


def listening(tgids: Iterable[int]) -> set[int]:
    """Those of the processes TGIDS that hold a listening TCP socket, as far as this agent may
    see."""
    of_namespace: dict[str, frozenset[str]] = {}
    found = set()
    for tgid in tgids:
        place, namespace = _network_namespace(PROC / str(tgid))
        with suppress(*_HIDDEN):
            if namespace and namespace not in of_namespace:
                of_namespace[namespace] = frozenset(_listeners(place))
            sockets = of_namespace.get(namespace, ())
            if sockets and any(inode in sockets for inode in _open_sockets(place)):
                found.add(tgid)
    return found


def _network_namespace(process: Path) -> tuple[Path, str]:
    """A process's network namespace, and the directory in /proc that shows the process's files: a
    thread's, where the first thread has ended. An empty name for one that is hidden."""
    with suppress(*_HIDDEN):
        return process, os.readlink(process / "ns/net")  # noqa: PTH115  a name, not a path
    with suppress(*_HIDDEN):
        for thread in (process / "task").iterdir():
            with suppress(*_HIDDEN):
                return thread, os.readlink(thread / "ns/net")  # noqa: PTH115
    return process, ""


def _listeners(place: Path) -> Iterator[str]:
    """The inodes of all listening sockets in the network namespace of a process at PLACE."""
    for name in ("net/tcp", "net/tcp6"):
        with suppress(FileNotFoundError), (place / name).open() as lines:  # no IPv6
            next(lines, None)  # the header
            for line in lines:
                columns = line.split()
                # The kernel lists listeners first; there may be a million connections.
                if columns[_STATE] != _LISTEN:
                    break
                yield columns[_INODE]


def _open_sockets(place: Path) -> Iterator[str]:
    """The inodes of the open sockets of a process at PLACE, from its lowest descriptor on:
    listeners are among the first, and there may be a million connections."""
    with os.scandir(place / "fd") as descriptors:
        for descriptor in descriptors:
            with suppress(FileNotFoundError):  # it is closed meanwhile
                if match := _SOCKET.fullmatch(os.readlink(descriptor.path)):  # noqa: PTH115
                    yield match[1]
