"""Connections and peers as a tap of `tcp_metrics` shows them, several alike added up to one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from coral.client import Buckets
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.picking import pick

CLIENT: Final = pb.TCP_ROLE_CLIENT
SERVER: Final = pb.TCP_ROLE_SERVER
LISTENER: Final = pb.TCP_ROLE_LISTENER
OTHER: Final = "other"  # the agent's word for rows that it has added up
_ALIKE_MANY: Final = 3  # more to one peer are one line; of those that have ended, more than one
_ADDRESSES_MANY: Final = 10  # more addresses at one server are one line

# How it ended, in a word; capitals are for what should not have happened.
END_WORDS: Final = {
    pb.TCP_END_FIN_LOCAL: "closed",
    pb.TCP_END_FIN_REMOTE: "peer closed",
    pb.TCP_END_FIN_BOTH: "both closed",
    pb.TCP_END_RESET_LOCAL: "RESET",
    pb.TCP_END_RESET_REMOTE: "PEER RESET",
    pb.TCP_END_TIMEOUT: "TIMEOUT",
    pb.TCP_END_REFUSED: "REFUSED",
    pb.TCP_END_ERROR: "ERROR",
    pb.TCP_END_ABORTED: "GIVEN UP",
}
_STATE_WORDS: Final = {
    pb.TCP_STATE_ESTABLISHED: "open",
    pb.TCP_STATE_SYN_SENT: "opening",
    pb.TCP_STATE_SYN_RECV: "opening",
    pb.TCP_STATE_CLOSE_WAIT: "close-wait",
    pb.TCP_STATE_LISTEN: "listening",
}
_WELL: Final = (pb.TCP_END_OPEN, pb.TCP_END_FIN_LOCAL, pb.TCP_END_FIN_REMOTE, pb.TCP_END_FIN_BOTH)


class Health(IntEnum):
    """How much attention a connection needs."""

    WELL = 0
    LOSSY = 1
    BAD = 2


@dataclass
class Flow:
    """One connection, or several added up, over one interval or over several."""

    role: int = pb.TCP_ROLE_UNSPECIFIED
    address: str = ""
    port: int = 0  # of a client the remote one, else the local one
    other_port: int = 0
    pid: int = 0
    comm: str = ""
    word: str = ""
    health: Health = Health.WELL
    connections: int = 1
    addresses: int = 1
    opened: int = 0
    closed: int = 0
    failed: int = 0
    open: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    ever_out: int = 0
    ever_in: int = 0
    segments: int = 0
    retransmits: int = 0
    resets: int = 0
    dropped: int = 0  # attempts to connect, by a listener
    full: int = 0  # in how many rows a listener's backlog was full
    rtt_us: float = 0.0
    rtt: Buckets = field(default_factory=Buckets)
    window: int = 0
    age_ns: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    pod: str = ""  # where the session watches several

    @property
    def resent_share(self) -> float:
        """The share of the segments that were sent again."""
        return min(self.retransmits / max(self.segments, 1), 1.0)

    @property
    def round_trip_us(self) -> float:
        """The kernel's smoothed round trip; of several connections, the median of all."""
        if self.connections == 1 and self.rtt_us:
            return self.rtt_us
        return self.rtt.quantile(0.5) or self.rtt_us

    def merge(self, more: Flow) -> None:
        """Adds another one; process, peer and word stay as they were."""
        self.connections += more.connections
        self.opened += more.opened
        self.closed += more.closed
        self.failed += more.failed
        self.open += more.open
        self.bytes_out += more.bytes_out
        self.bytes_in += more.bytes_in
        self.ever_out += more.ever_out
        self.ever_in += more.ever_in
        self.segments += more.segments
        self.retransmits += more.retransmits
        self.resets += more.resets
        self.dropped += more.dropped
        self.full += more.full
        self.health = max(self.health, more.health)
        self.age_ns = max(self.age_ns, more.age_ns)
        self.window = max(self.window, more.window)
        self.rtt.add(more.rtt)
        self.rtt_us = max(self.rtt_us, more.rtt_us)
        for word, count in more.ends.items():
            self.ends[word] += count


def of_connection(row: pb.TcpMetrics, pod: str = "") -> Flow:
    """A row of one connection, or of several that the agent has added up."""
    delta = row.delta
    ended = has_ended(row)
    resent = delta.retransmits or delta.syn_ack_retransmits
    flow = Flow(
        role=row.role,
        address=row.remote_address,
        port=row.remote_port if row.role == CLIENT else row.local_port,
        pod=pod,
        other_port=row.local_port if row.role == CLIENT else row.remote_port,
        pid=row.pid,
        comm=row.comm,
        connections=row.connections or int(row.role != LISTENER),
        opened=row.opened,
        closed=int(ended),
        failed=int(ended and not row.was_established),
        open=int(not ended and row.role in (CLIENT, SERVER)),
        bytes_out=delta.bytes_sent,
        bytes_in=delta.bytes_received,
        ever_out=row.total.bytes_sent,
        ever_in=row.total.bytes_received,
        segments=delta.segments_sent,
        retransmits=resent,
        resets=delta.resets_sent + delta.resets_received,
        dropped=delta.listen_drops,
        full=int(row.role == LISTENER and row.backlog > row.backlog_limit),
        rtt_us=row.rtt_us,
        window=row.congestion_window,
        age_ns=row.duration_ns,
    )
    flow.rtt.add(row.rtt_us_delta)
    if ended:
        flow.word = end_word(row.end, row.error)
        flow.ends[flow.word] += 1
        flow.health = Health.WELL if row.end in _WELL else Health.BAD
    elif row.role == LISTENER:
        flow.word = _listener_word(row)
    elif resent:
        flow.word = "LOSSY" if row.was_established or row.connections else "UNANSWERED"
    else:
        flow.word = "" if row.connections else _STATE_WORDS.get(row.state, "closing")
    if resent or row.role == LISTENER:
        flow.health = max(flow.health, Health.BAD if flow.dropped else Health.LOSSY)
    return flow


def _listener_word(row: pb.TcpMetrics) -> str:
    backlog = f"{row.backlog:,} of {row.backlog_limit:,} wait"
    if row.delta.listen_drops:
        return f"DROPPED {row.delta.listen_drops:,}, {backlog}"
    if row.delta.resets_sent or row.delta.resets_received:
        return "RESETS"
    return "SYN RESENT" if row.delta.syn_ack_retransmits else f"FULL, {backlog}"


def has_ended(row: pb.TcpMetrics) -> bool:
    """Whether it is over. A connection that is still closing may have an `end` already."""
    return bool(row.end) and row.state == pb.TCP_STATE_CLOSE


def of_peer(row: pb.TcpPeerMetrics, pod: str = "") -> Flow:
    """A row of all connections with one peer."""
    flow = Flow(
        role=row.role,
        address=row.remote_address,
        port=row.port,
        pod=pod,
        connections=row.connections_open + row.connections_closed,
        opened=row.connections_opened,
        closed=row.connections_closed,
        failed=row.connections_failed,
        open=row.connections_open,
        bytes_out=row.delta.bytes_sent,
        bytes_in=row.delta.bytes_received,
        segments=row.delta.segments_sent,
        retransmits=row.delta.retransmits or row.delta.syn_ack_retransmits,
        resets=row.delta.resets_sent + row.delta.resets_received,
        dropped=row.delta.listen_drops,
    )
    flow.rtt.add(row.rtt_us_delta)
    if flow.retransmits or flow.role == LISTENER:
        flow.health = Health.BAD if flow.dropped else Health.LOSSY
    # The errors of those that failed say more than ERROR does.
    errors = [name for name in row.failures if name not in ("", "ECONNREFUSED", "ETIMEDOUT")]
    for name, count in row.ends.items():
        end = pb.TcpEnd.Value(f"TCP_END_{name.upper()}")
        error = errors[0] if len(errors) == 1 else ""
        flow.ends[end_word(end, error)] += count
        if end not in _WELL:
            flow.health = Health.BAD
    return flow


def end_word(end: int, error: str = "") -> str:
    """How a connection ended, in a word; an error by its name."""
    if end == pb.TCP_END_ERROR and error:
        return error
    return END_WORDS.get(end, "ended")  # type: ignore[call-overload, no-any-return]


def is_bad(word: str) -> bool:
    """Whether a word says that a connection should not have ended so."""
    return word.isupper()


def fold(flows: Sequence[Flow]) -> list[Flow]:
    """Many that are alike as one: those with one peer, and those of one server with many
    addresses."""
    lasting = [flow for flow in flows if not flow.closed]
    ended = [flow for flow in flows if flow.closed]
    alike = [*_fold(lasting, _ALIKE_MANY, _likeness), *_fold(ended, 1, _likeness)]
    return list(
        _fold(
            alike,
            _ADDRESSES_MANY,
            lambda f: (f.pid, f.port, f.word, f.pod) if f.role == SERVER else None,
            addresses=True,
        )
    )


def _likeness(flow: Flow) -> Hashable:
    return flow.pid, flow.role, flow.address, flow.port, flow.word, flow.pod


def fold_peers(flows: Iterable[Flow]) -> list[Flow]:
    """The many addresses of one server as one."""
    return list(
        _fold(
            flows,
            _ADDRESSES_MANY,
            lambda f: (f.port, f.pod) if f.role == SERVER else None,
            addresses=True,
        )
    )


def _fold(
    flows: Iterable[Flow],
    many: int,
    key_of: Callable[[Flow], Hashable],
    *,
    addresses: bool = False,
) -> Iterator[Flow]:
    groups: dict[Hashable, list[Flow]] = {}
    for flow in flows:
        key = key_of(flow)
        groups.setdefault(id(flow) if key is None else key, []).append(flow)
    for members in groups.values():
        if len(members) <= many:
            yield from members
            continue
        one = sum_of(members)
        one.addresses = sum(flow.addresses for flow in members) if addresses else 1
        yield one


def sum_of(flows: Sequence[Flow]) -> Flow:
    """Several as one, with process, peer and word of the first."""
    first = flows[0]
    one = Flow(first.role, first.address, first.port, 0, first.pid, first.comm, first.word)
    one.pod = first.pod
    one.connections = 0
    for flow in flows:
        one.merge(flow)
    return one


def choose(flows: Sequence[Flow], most: int) -> tuple[list[Flow], list[Flow]]:
    """The MOST that are shown, busiest first, and the rest. Those in trouble get up to half of the
    lines before others, however little they carried; the agent's own sum of others is last."""

    def busy(flow: Flow) -> tuple[bool, int, int, int]:
        carried = flow.bytes_out + flow.bytes_in
        return (flow.address == OTHER, -carried, -flow.health, -flow.connections)

    def worst(flow: Flow) -> tuple[int, int, int]:
        return (-flow.health, -max(flow.failed, flow.retransmits), -flow.connections)

    def in_trouble(flow: Flow) -> bool:
        return bool(flow.health) and flow.address != OTHER

    return pick(flows, most, busy, worst, in_trouble)
