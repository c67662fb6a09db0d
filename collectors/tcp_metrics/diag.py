"""Connections as reported by sock_diag, where no program reads them: those that were open before
the programs were attached, and the present figures of all.

sock_diag identifies a socket by its cookie, the programs by its address. So the cookies of the
sockets found at the start go into a map (`found` of connections.bpf.h), and the programs take a
connection over at its next hook. Until then it is reported from here, afterwards by the programs,
under the same identity, so that what it carries is counted once.
"""

from __future__ import annotations

import errno
import re
import time
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import HashMap
from coral.bpf.libbpf import BpfError
from coral.bpf.probing import sock_diag
from coral.collectors.procfs import PROC
from coral.collectors.tcp_metrics.connections import LISTENER, NAMES

# A dump takes about 5 us per socket: this rest limits the cost to a twentieth of a CPU.
_REST_NS: Final = 100_000
_MOST_MISSING: Final = 3  # a dump may skip a socket that moves in the kernel's table
_SOCKET: Final = re.compile(r"socket:\[(\d+)\]")
_CLIENT, _SERVER = 1, 2  # enum TcpRole
_AF_INET: Final = 2
# enum TcpState, as in the kernel.
_ESTABLISHED, _SYN_SENT, _FIN_WAIT1, _FIN_WAIT2 = 1, 2, 4, 5
_CLOSE_WAIT, _LAST_ACK, _LISTEN, _CLOSING = 8, 9, 10, 11
_MAPPED: Final = np.frombuffer(bytes(10) + b"\xff\xff", np.uint8)
_ENDS: Final = ("network", "local_port", "remote_port", "local", "remote")
_COUNTED: Final = (*NAMES[: NAMES.index("retransmits_fast")], "listen_drops")
_FOUND: Final = tuple(f"found_{name}" for name in _COUNTED)


class DiagConnections:
    """The connections of one session that sock_diag reports, beside those of the programs."""

    def __init__(self, connections: HashMap, found: HashMap) -> None:
        self._connections, self._found_map = connections, found
        self._networks: dict[int, set[int]] = {}  # each with processes seen in it
        self._found = np.empty(0, connections.value_dtype)  # as of the start, by cookie
        self._idle = self._found  # those that only sock_diag reports
        self._missing = Counter[int]()  # number of dumps, by cookie
        self._sockets = np.empty(0, sock_diag.SOCKET)  # all sockets of the last dump
        self._ends = _ends_of(self._found)  # of the same sockets
        self._asked_ns = 0
        self.unfollowed = 0  # the maps had no room for them

    def find(self, processes: Mapping[int, str], groups: Mapping[int, int]) -> None:
        """Finds the connections of PROCESSES, command names by tgid; GROUPS are those of struct
        member, 0 for a process that is not among them. Call it after the programs are attached,
        which see every later connection. Raises `BpfError`."""
        owners = _socket_owners(processes)
        self._networks = _networks(processes)
        parts = [self._found]
        for network in self._networks:
            sockets = self._ask(network, owners)
            sockets = sockets[np.unique(sockets["socket"]["cookie"], return_index=True)[1]]
            records = _identified(sockets, self._found.dtype, network)
            records["pid"] = [owners[inode] for inode in sockets["socket"]["inode"].tolist()]
            records["comm"] = [processes[tgid].encode() for tgid in records["pid"].tolist()]
            records["group"] = [groups.get(tgid, 0) for tgid in records["pid"].tolist()]
            _name_roles(records, sockets)
            _count(records, sockets)
            parts.append(records)
        found = np.concatenate(parts)
        # Leave out what the programs have found meanwhile.
        found = found[~np.isin(_ends_of(found), _ends_of(self._connections.read()[1]))]
        for name in _COUNTED:
            found[f"found_{name}"] = found[name]
        found = found[np.array(self._tell(found), bool)]
        self._found = found[np.argsort(found["cookie"])]
        self._idle = self._found

    def read(self, *, now: bool) -> None:
        """Dumps the sockets again, unless that would cost too much time; always if NOW. Call it
        before the programs' connections are read, so that none is missed that they take over."""
        rest_ns = time.monotonic_ns() - self._asked_ns
        if not (now or rest_ns > _REST_NS * len(self._sockets)):
            return
        self._asked_ns = time.monotonic_ns()
        empty = np.empty(0, self._found.dtype)
        parts, identified = [np.empty(0, sock_diag.SOCKET)], [empty]
        for network in self._networks:
            parts.append(self._ask(network))
            identified.append(_identified(parts[-1], empty.dtype, network))
        self._sockets, self._ends = np.concatenate(parts), _ends_of(np.concatenate(identified))
        _, at, idle = np.intersect1d(
            self._sockets["socket"]["cookie"], self._idle["cookie"], return_indices=True
        )
        records = self._idle[idle]
        _count(records, self._sockets[at])
        gone = np.delete(self._idle, idle)
        gone = gone[gone["role"] != LISTENER]
        self._missing = Counter({c: self._missing[c] + 1 for c in gone["cookie"].tolist()})
        still = [self._missing[c] < _MOST_MISSING for c in gone["cookie"].tolist()]
        self.unfollowed += still.count(False)  # ended without the programs having room for it
        self._idle = np.concatenate([records, gone[np.array(still, bool)]])

    def merged(self, live: NDArray[Any], ended: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """The programs' connections LIVE and ENDED: the live ones with the figures of the last
        dump, and those that only sock_diag reports. What was found at the start keeps its identity.
        """
        live = self._as_answered(live)
        if len(self._found):
            live, ended = self._recognized(live), self._recognized(ended)
            for taken in (live, ended):
                self._idle = self._idle[~np.isin(self._idle["found_ns"], taken["found_ns"])]
            live = np.concatenate([live, self._idle])
        return live, ended

    def _as_answered(self, live: NDArray[Any]) -> NDArray[Any]:
        for network in np.unique(live["network"]).tolist():
            mine = live["pid"][live["network"] == network]
            self._networks.setdefault(network, set()).update(mine.tolist())
        _, at, known = np.intersect1d(self._ends, _ends_of(live), return_indices=True)
        records, sockets = live[known], self._sockets[at]
        # For a connection that is changing, the programs' figures stand.
        same = (records["state"] == sockets["socket"]["state"]) & (records["ended_ns"] == 0)
        same &= records["read_ns"] < self._asked_ns
        records = records[same]
        _count(records, sockets[same])
        live = live.copy()
        live[known[same]] = records
        return live

    def _recognized(self, records: NDArray[Any]) -> NDArray[Any]:
        at = np.searchsorted(self._found["cookie"], records["cookie"])
        at = at.clip(max=len(self._found) - 1)
        ours = (self._found["cookie"][at] == records["cookie"]) & (records["start_ns"] == 0)
        if ours.any():
            records = records.copy()
            for name in ("sk", "found_ns", *_FOUND):
                records[name][ours] = self._found[name][at[ours]]
        return records

    def _ask(self, network: int, inodes: Container[int] | None = None) -> NDArray[Any]:
        """The sockets in a network namespace, all or those with INODES, through a process that is
        still in it. None if it cannot be entered."""
        ways: list[Path | None] = [None]
        if network != _network_of("self"):
            there = {tgid for tgid in self._networks[network] if _network_of(tgid) == network}
            self._networks[network] = there
            ways = [PROC / str(tgid) / "ns/net" for tgid in there]
        for way in ways:
            with suppress(OSError):
                return sock_diag.tcp_sockets(inodes, way)
        return np.empty(0, sock_diag.SOCKET)

    def _tell(self, found: NDArray[Any]) -> list[bool]:
        """Whether the map had room, for each connection."""
        return [
            self._write(self._found_map, cookie, (pid, group, comm))
            for cookie, pid, group, comm in found[["cookie", "pid", "group", "comm"]].tolist()
        ]

    def _write(self, to: HashMap, key: object, value: object) -> bool:
        try:
            to.write(key, value)
        except BpfError as error:
            if error.errno != errno.E2BIG:
                raise
            self.unfollowed += 1
            return False
        return True


def _socket_owners(tgids: Iterable[int]) -> dict[int, int]:
    """By the inode of a socket, the first of these processes that has it open. Processes that may
    not be inspected are left out."""
    owners: dict[int, int] = {}
    for tgid in sorted(tgids):
        with suppress(OSError):
            for entry in (PROC / str(tgid) / "fd").iterdir():
                with suppress(OSError):  # it was closed meanwhile
                    if socket := _SOCKET.fullmatch(str(entry.readlink())):
                        owners.setdefault(int(socket[1]), tgid)
    return owners


def _network_of(tgid: int | str) -> int | None:
    try:
        return (PROC / str(tgid) / "ns/net").stat().st_ino
    except OSError:
        return None


def _networks(tgids: Iterable[int]) -> dict[int, set[int]]:
    """The network namespaces of these processes, each with its processes."""
    found: dict[int, set[int]] = {}
    for tgid in tgids:
        if (network := _network_of(tgid)) is not None:
            found.setdefault(network, set()).add(tgid)
    return found


def _identified(sockets: NDArray[Any], dtype: np.dtype[Any], network: int) -> NDArray[Any]:
    """SOCKETS as struct tcp_connection, with everything that does not change."""
    message = sockets["socket"]
    records = np.zeros(len(sockets), dtype)
    for name in ("cookie", "state", "local_port", "remote_port"):
        records[name] = message[name]
    records["found_ns"], records["network"] = message["cookie"], network
    records["scope_id"] = message["interface"]
    v4 = message["family"] == _AF_INET
    for name in ("local", "remote"):
        address = np.ascontiguousarray(message[name]).view(np.uint8).reshape(-1, 16)
        records[name] = address
        records[name][v4, :12], records[name][v4, 12:] = _MAPPED, address[v4, :4]
    return records


def _under_way(sockets: NDArray[Any]) -> NDArray[np.int64]:
    unacked = sockets["socket"]["unacked"].astype(np.int64)
    unsent: NDArray[np.int64] = sockets["info"]["unsent"].astype(np.int64)
    return unacked - unsent


def _payload(info: NDArray[Any]) -> NDArray[np.int64]:
    """Bytes that were sent first, from Linux 4.19 on; what was dropped before it left the machine
    counts each time."""
    payload: NDArray[np.int64] = info["bytes_sent"].astype(np.int64)
    return payload - info["bytes_retransmitted"].astype(np.int64)


def _name_roles(records: NDArray[Any], sockets: NDArray[Any]) -> None:
    """Servers by the port of a listener among RECORDS, others by sequence numbers: see
    role_by_numbering in connections.bpf.h. The payload counts what was dropped before it left the
    machine twice. Where it exceeds what can be on its way, there is no listener: it is a client."""
    info, state = sockets["info"], records["state"]
    listens = state == _LISTEN
    ports = records[["network", "local_port"]]
    served = np.isin(ports, ports[listens])
    payload = _payload(info)
    payload += ~np.isin(state, (_ESTABLISHED, _CLOSE_WAIT)) & (info["unsent"] == 0)
    numbered = info["bytes_acked"].astype(np.int64) + _under_way(sockets)
    began = (numbered != payload) | (state == _SYN_SENT)
    roles = np.where(~served & began, _CLIENT, _SERVER)
    records["role"] = np.where(listens, LISTENER, roles)


def _count(records: NDArray[Any], sockets: NDArray[Any]) -> None:
    """Sets the kernel's counters in RECORDS, whose role is known, as `refresh` does."""
    info, state = sockets["info"], sockets["socket"]["state"]
    listens = records["role"] == LISTENER
    records["listen_drops"] = sockets["drops"] * listens
    # In a listener's message, these are about its backlog.
    records["backlog"] = sockets["socket"]["unread"] * listens
    records["backlog_limit"] = sockets["socket"]["unacked"] * listens
    for name in (
        "bytes_retransmitted", "segments_sent", "segments_received", "retransmits", "rtt_min_us",
        "congestion_window", "slow_start_threshold",
    ):  # fmt: skip
        records[name] = info[name]
    records["state"], records["read_ns"] = state, time.monotonic_ns()
    records["segment_bytes"] = info["mss"]
    records["srtt_us"], records["rtt_deviation_us"] = (
        info["rtt_us"] * 8,
        info["rtt_variation_us"] * 4,
    )
    under_way = _under_way(sockets)
    fin_came = np.isin(state, (_CLOSE_WAIT, _LAST_ACK, _CLOSING))
    fin_under_way = np.isin(state, (_FIN_WAIT1, _CLOSING, _LAST_ACK)) & (info["unsent"] == 0)
    acked = info["bytes_acked"].astype(np.int64)
    acked -= (records["role"] == _CLIENT).astype(np.int64) + (state == _FIN_WAIT2)
    records["bytes_received"] = (info["bytes_received"].astype(np.int64) - fin_came).clip(min=0)
    records["bytes_acked"] = acked = acked.clip(min=0)
    under_way -= fin_under_way & (under_way > 0)
    under_way[listens | (state == _SYN_SENT)] = 0
    # The kernel reads `unacked` before it locks the socket, and the rest after: what is
    # acknowledged between them is in both. There cannot be more than what the socket has sent.
    most = np.where(info["bytes_sent"] > 0, _payload(info), acked + under_way)
    records["bytes_sent"] = np.minimum(acked + under_way, most).clip(min=acked)


def _ends_of(records: NDArray[Any]) -> NDArray[Any]:
    """Both ends and the network of connections, as byte strings that numpy can compare."""
    columns = [
        np.frombuffer(records[name].tobytes(), np.uint8).reshape(
            len(records), records.dtype[name].itemsize
        )
        for name in _ENDS
    ]
    packed = np.ascontiguousarray(np.hstack(columns))
    return packed.view(f"S{packed.shape[1]}").reshape(-1)
