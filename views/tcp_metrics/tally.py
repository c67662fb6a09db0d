"""Batches of `tcp_metrics`: the last interval, and sums of all, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views import data
from coral.views.errnos import errno_name
from coral.views.intervals import Intervals
from coral.views.pods import row_pods
from coral.views.tcp_metrics.flows import (
    CLIENT,
    LISTENER,
    OTHER,
    SERVER,
    Flow,
    end_word,
    has_ended,
    is_bad,
    of_connection,
    of_peer,
    sum_of,
)

_MOST_PEERS: Final = 10_000
_MOST_TROUBLES: Final = 10_000
_ERRNO_OF: Final = {"REFUSED": "ECONNREFUSED", "TIMEOUT": "ETIMEDOUT"}
_RETRANSMITS: Final = (
    pb.TcpStateChange.WHAT_RETRANSMIT_FAST,
    pb.TcpStateChange.WHAT_RETRANSMIT_TIMEOUT,
    pb.TcpStateChange.WHAT_RETRANSMIT_TAIL_PROBE,
    pb.TcpStateChange.WHAT_RETRANSMIT_HANDSHAKE,
)
_RESETS: Final = (
    pb.TcpStateChange.WHAT_RESET_SENT,
    pb.TcpStateChange.WHAT_RESET_RECEIVED,
)

_ATTEMPTS: Final = (pb.TCP_STATE_SYN_SENT, pb.TCP_STATE_SYN_RECV)

_Peer = tuple[int, str, int, str]


class Trouble(NamedTuple):
    """A way in which connections ended badly: how, why, whose, and with which peer."""

    word: str
    why: str
    comm: str
    role: int
    address: str
    port: int
    pod: str


class Tally:
    """Everything that the batches of a tap have reported."""

    def __init__(self) -> None:
        self.intervals = Intervals()
        self.by_peer = False
        self.single_events = False
        # False where rows that the agent has added up hide which connections are open.
        self.knows_open = True
        self.latest: list[Flow] = []
        self.interval = Flow(connections=0)  # the sum of the latest
        self._before = Flow(connections=0)  # the sum of those before it
        self.troubles: Counter[Trouble] = Counter()
        self._peers: dict[_Peer, Flow] = {}
        self._open: dict[Hashable, tuple[pb.TcpMetrics, str, int]] = {}
        self._open_at: dict[_Peer, int] = {}
        self._moved: set[Hashable] = set()
        self._end_ns = 0

    def add(self, batch: Batch) -> None:
        """Takes in figures, or single events."""
        message = batch.message
        if self.intervals.add(message):
            self._before.merge(self.interval)
            self.latest = []
            self.interval = Flow(connections=0)
            self._moved = set()
            self._end_ns = message.interval_end_ns
        if len(batch.events):
            self.single_events = True
            for flow, why in map(_of_event, event_rows(batch), row_pods(batch)):
                self._take(flow, why)
        else:
            self._add_figures(batch.message, row_pods(batch))

    def _add_figures(self, message: pb.EbpfEventBatch, pods: Iterable[str]) -> None:
        for row, pod in zip(message.tcp_metrics, pods, strict=False):
            self._follow(row, pod)
            flow = of_connection(row, pod)
            self.latest.append(flow)
            self._take(flow, row.error or row.reset_reason)
        for peer, pod in zip(message.tcp_peers, pods, strict=False):
            self.by_peer = True
            flow = of_peer(peer, pod)
            self.latest.append(flow)
            self._open_at[_peer_of(flow)] = flow.open
            self._take(flow, failures=peer.failures)

    def _follow(self, row: pb.TcpMetrics, pod: str) -> None:
        """Notes whether it is open."""
        if row.connections:
            self.knows_open = False
        if row.connections or row.role not in (CLIENT, SERVER):
            return
        key: Hashable = row.connection_id or (
            row.network_namespace,
            row.local_address,
            row.local_port,
            row.remote_address,
            row.remote_port,
            row.start_ns,
        )
        self._moved.add(key)
        if has_ended(row):
            self._open.pop(key, None)
        else:
            self._open[key] = row, pod, self._end_ns

    def _take(self, flow: Flow, why: str = "", failures: Mapping[str, int] | None = None) -> None:
        self.interval.merge(flow)
        key = _peer_of(flow)
        if key not in self._peers and len(self._peers) >= _MOST_PEERS:
            key = 0, OTHER, 0, ""
        if key not in self._peers:
            role, address, port, pod = key
            self._peers[key] = Flow(role, address, port, pod=pod, connections=0)
        self._peers[key].merge(flow)
        for word, count in flow.ends.items():
            if not is_bad(word):
                continue
            if failures is not None:
                why = _ERRNO_OF.get(word, "")
                why = why if why in failures else ""
            trouble = Trouble(word, why, flow.comm, *_peer_of(flow))
            if trouble not in self.troubles and len(self.troubles) >= _MOST_TROUBLES:
                trouble = Trouble(word, why, "", 0, OTHER, 0, "")
            self.troubles[trouble] += count

    @property
    def open_now(self) -> int:
        """Connections that are open."""
        return sum(self._open_at.values()) if self.by_peer else len(self._open)

    def idle(self, *, everything: bool = False) -> list[Flow]:
        """The open connections in which nothing moved in the last interval; with EVERYTHING all
        that are open, as if nothing had."""
        flows = []
        for key, (row, pod, told_ns) in self._open.items():
            if everything or key not in self._moved:
                still = pb.TcpMetrics()
                still.CopyFrom(row)
                still.ClearField("delta")
                still.ClearField("rtt_us_delta")
                flow = of_connection(still, pod)
                flow.opened = 0
                if row.start_ns:
                    flow.age_ns += max(self._end_ns - told_ns, 0)
                flows.append(flow)
        return flows

    def peers(self) -> list[Flow]:
        """The sums of all intervals by peer, with what is open now."""
        open_at = Counter(self._open_at)
        if not self.by_peer:
            open_at = Counter(
                _peer_of(of_connection(row, pod)) for row, pod, _ in self._open.values()
            )
        for key, flow in self._peers.items():
            flow.open = open_at[key]
        return [
            flow
            for flow in self._peers.values()
            if flow.role != LISTENER or flow.retransmits or flow.dropped or flow.full
        ]

    @property
    def all(self) -> Flow:
        """The sum of all intervals."""
        return sum_of([self._before, self.interval])


def _peer_of(flow: Flow) -> _Peer:
    if flow.address == OTHER:
        return 0, OTHER, 0, ""
    return flow.role, flow.address, flow.port, flow.pod


def event_rows(batch: Batch) -> Iterable[dict[str, Any]]:
    """Each single event, with addresses and names as texts."""
    return data.event_rows(batch, "comm", "reason")


def _of_event(event: Mapping[str, Any], pod: str) -> tuple[Flow, str]:
    """What a single event of a pod adds to its peer, and the error of a connection that ended
    badly."""
    client = event["role"] == CLIENT
    flow = Flow(
        role=event["role"],
        address=event["remote_address"],
        port=event["remote_port"] if client else event["local_port"],
        pod=pod,
        comm=event["comm"],
        connections=0,
    )
    what, new = event["what"], event["new_state"]
    if what in _RETRANSMITS:
        flow.retransmits = event["count"]
    elif what in _RESETS:
        flow.resets = event["count"]
    elif event["role"] == LISTENER:
        pass
    elif new == (pb.TCP_STATE_SYN_SENT if client else pb.TCP_STATE_ESTABLISHED):
        flow.opened = 1
    elif new == pb.TCP_STATE_CLOSE:
        flow.closed = 1
        flow.failed = int(event["old_state"] in _ATTEMPTS)
        flow.ends[event_end(event)] = 1
    return flow, errno_name(event["error"])


def event_end(event: Mapping[str, Any]) -> str:
    """How a connection ended, in a word."""
    if event["end"] == pb.TCP_END_ABORTED and event["old_state"] not in _ATTEMPTS:
        # Only a reset closes an established one so; the next event reports that it was sent.
        return end_word(pb.TCP_END_RESET_LOCAL)
    return end_word(event["end"], errno_name(event["error"]))
