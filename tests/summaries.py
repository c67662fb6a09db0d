"""Summaries of every type that no kernel gave: for tests of what collectors make of figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coral.collectors.clock import Reading, UnixClock
from coral.collectors.contract import Summaries
from coral.collectors.http_latency import summaries as request_rows
from coral.collectors.http_latency.paths import Paths
from coral.collectors.http_latency.routes import Routes
from coral.collectors.members import Members
from coral.collectors.syscall_stats import rows as syscall_rows
from coral.collectors.syscall_stats.counters import COLUMNS as SYSCALL_COLUMNS
from coral.collectors.syscall_stats.counters import LATENCY, TOTAL_NS, Increase
from coral.collectors.tcp_metrics import peers as peer_rows
from coral.collectors.tcp_metrics import rows as connection_rows
from coral.collectors.tcp_metrics.connections import COLUMNS, Changes
from coral.mesh.v1 import ebpf_pb2 as pb

# Makes summaries by a seed, a number of rows at most, and `top`.
Make = Callable[[int, int, int], Summaries]

MEMBERS = Members(
    np.array([7, 5 << 32 | 9], np.uint64),
    np.array([b"shop", b"db"], "S16"),
    np.array([0, 0], np.uint32),
)
_CLOCK = UnixClock(lambda: Reading(0, 0, 10**18, 0))
RECORD = np.dtype(
    [
        *((name, "u8") for name in ("start_ns", "established_ns", "ended_ns", "read_ns", "cookie")),
        *(
            (name, "u4")
            for name in (
                "pid", "network", "local_port", "remote_port", "srtt_us", "rtt_deviation_us",
                "rtt_min_us", "congestion_window", "slow_start_threshold", "segment_bytes",
                "error", "reset_reason", "backlog", "backlog_limit", "scope_id", "group",
            )
        ),
        *((name, "u1") for name in ("role", "state", "end")),
        ("comm", "S16"),
        *((name, "u1", (16,)) for name in ("local", "remote")),
    ]
)  # fmt: skip

# struct http_exchange, without its head.
EXCHANGE = np.dtype(
    [
        *(
            (name, "u8")
            for name in (
                "began_ns", "asked_ns", "first_ns", "ended_ns", "connection",
                "request_body_bytes", "response_body_bytes", "path_hash",
            )
        ),
        *((name, "u4") for name in ("number", "pid", "born", "network")),
        *((name, "u2") for name in ("local_port", "remote_port", "status", "path_bytes")),
        *(
            (name, "u1")
            for name in ("method", "version", "role", "outcome", "path_flags", "tls")
        ),
        *((name, "u1", (16,)) for name in ("local", "remote")),
        ("path", "u8", (32,)),
    ]
)  # fmt: skip

# struct http_detailed.
DETAILED = np.dtype(
    [
        ("exchange", EXCHANGE), ("trace", "u8", (2,)), ("parent", "u8"), ("host", "u8", (8,)),
        ("query_bytes", "u2"), ("host_bytes", "u1"),
    ]
)  # fmt: skip


def increase(seed: int, count: int) -> Increase:
    """Calls of COUNT pairs of process and system call."""
    random = np.random.default_rng(seed)
    pairs = random.permutation(48)[:count].astype(np.uint32)
    counters = random.integers(0, 4, (count, SYSCALL_COLUMNS)).astype(np.uint64)
    counters[:, LATENCY + int(random.integers(1, 32)) :] = 0
    counters[:, LATENCY] += np.uint64(1)
    counters[:, TOTAL_NS] = random.integers(0, 10**12, count)
    tgids = pairs // 12 + 6
    born = np.where(tgids == 9, np.uint32(5), np.uint32(3))
    return Increase(tgids, born, pairs % 12, counters[:, TOTAL_NS] // 2, counters)


def changes(seed: int, count: int) -> Changes:
    """COUNT connections of every kind, in which anything or nothing moved."""
    random = np.random.default_rng(seed)
    c = np.zeros(count, RECORD)
    c["start_ns"] = random.choice([0, 10**9, 2 * 10**9], count)
    shook = random.random(count) < 0.7
    c["established_ns"] = shook * (c["start_ns"] + random.integers(1, 10**8, count))
    began = np.maximum(c["start_ns"], c["established_ns"])
    c["ended_ns"] = (random.random(count) < 0.5) * (began + random.integers(1, 10**10, count))
    c["read_ns"], c["cookie"] = 10**11, random.integers(1, 2**63, count)
    c["role"], c["state"] = random.integers(1, 4, count), random.integers(1, 12, count)
    c["end"], c["error"] = random.integers(1, 10, count), random.choice([0, 110, 111, 4000], count)
    c["reset_reason"], c["pid"] = random.integers(0, 20, count), random.integers(6, 10, count)
    c["comm"] = random.choice([b"cron", b"sh"], count)
    c["slow_start_threshold"] = random.choice([0x7FFFFFFF, 10], count)
    for name in ("local_port", "remote_port"):
        c[name] = random.integers(80, 82, count)
    for name in ("network", "srtt_us", "rtt_deviation_us", "rtt_min_us", "congestion_window"):
        c[name] = random.integers(0, 2**31, count)
    for name in ("local", "remote"):  # 10.0.0.0, ::, ::1
        c[name][:, 15] = random.integers(0, 2, count)
        c[name][random.random(count) < 0.3] = [*bytes(10), 255, 255, 10, 0, 0, 0]
    moved = random.random((count, 1)) < 0.7
    delta = (random.integers(0, 5, (count, COLUMNS)) * moved).astype(np.uint64)
    total = delta + random.integers(0, 2, (count, COLUMNS)).astype(np.uint64)
    established = (c["established_ns"] > 0) & (random.random(count) < 0.5)
    is_open = (c["ended_ns"] == 0) & (c["role"] != pb.TCP_ROLE_LISTENER)
    return Changes(c, total, delta, random.random(count) < 0.5, established, c[is_open])


def exchanges(paths: Sequence[bytes]) -> NDArray[Any]:
    """Requests for PATHS, all else 0."""
    made = np.zeros(len(paths), EXCHANGE)
    for exchange, path in zip(made, paths, strict=True):
        kept = path[:256]
        exchange["path"].view(np.uint8)[: len(kept)] = np.frombuffer(kept, np.uint8)
        exchange["path_bytes"], exchange["path_flags"] = len(kept), len(path) > len(kept)
        exchange["path_hash"] = fnv1a(path)
    return made


def fnv1a(path: bytes) -> int:
    """The hash of a path, as in messages.bpf.h."""
    found = 0xCBF29CE484222325
    for byte in path:
        found = (found ^ byte) * 0x100000001B3 & (1 << 64) - 1
    return found


def random_exchanges(seed: int, count: int) -> NDArray[Any]:
    """COUNT requests of every kind."""
    random = np.random.default_rng(seed)
    texts = (b"/", b"/users/7", b"/users/8", b"/orders/9/items", b"*", b"")
    made = exchanges([texts[at] for at in random.integers(0, len(texts), count)])
    answered = random.random(count) < 0.7
    made["status"] = answered * random.choice([101, 200, 201, 404, 500, 503], count)
    made["began_ns"] = random.integers(1, 10**9, count)
    first_ns = 10 ** random.uniform(2, 10, count).astype(np.uint64)
    made["first_ns"] = answered * (made["began_ns"] + first_ns)
    last_ns = (10 ** random.uniform(2, 10, count)).astype(np.uint64)
    made["ended_ns"] = made["began_ns"] + last_ns + np.where(answered, first_ns, 0)
    made["asked_ns"] = (random.random(count) < 0.9) * (made["began_ns"] + np.uint64(5))
    made["role"], made["method"] = random.integers(1, 3, count), random.integers(1, 11, count)
    made["outcome"] = random.integers(1, 6, count)
    made["version"], made["tls"] = random.integers(0, 2, count), random.integers(0, 2, count)
    for name in ("request_body_bytes", "response_body_bytes"):
        made[name] = random.integers(0, 10**9, count)
    made["connection"], made["pid"] = random.integers(1, 5, count), random.integers(6, 9, count)
    return made


def requests(seed: int, count: int, top: int) -> Summaries:
    return request_rows.summaries(random_exchanges(seed, count), Paths(Routes()), top)


def syscalls(seed: int, count: int, top: int) -> Summaries:
    return syscall_rows.summaries(increase(seed, count), MEMBERS, top)


def connections(seed: int, count: int, top: int) -> Summaries:
    return connection_rows.connection_summaries(changes(seed, count), MEMBERS, _CLOCK, top)


def peers(seed: int, count: int, top: int) -> Summaries:
    return peer_rows.peer_summaries(changes(seed, count), top)
