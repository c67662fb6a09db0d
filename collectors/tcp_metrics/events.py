"""Single things that happen to connections, from the kernel to rows, by array."""

from __future__ import annotations

import time
from typing import Final

import numpy as np

from coral.bpf import RecordReader
from coral.collectors.contract import EventRows
from coral.collectors.tcp_metrics.rows import RESET_REASONS
from coral.mesh.v1 import ebpf_pb2 as pb

_COPIED: Final = (
    "pid", "local_port", "remote_port", "role", "what", "old_state", "new_state", "count", "error",
    "end",
)  # fmt: skip
_ROW: Final = np.dtype(
    [
        ("time_ns", "<i8"),
        ("connection_id", "<u8"),
        *((f"{end}_{half}", "<u8") for end in ("local", "remote") for half in ("high", "low")),
        *((name, "<u4") for name in (*_COPIED, "comm", "reason", "network_namespace")),
    ]
)


def event_rows(records: RecordReader) -> EventRows:
    """Everything since the last drain, with Unix time, addresses as numbers, and names."""
    read = records.drain()
    rows = np.empty(len(read), _ROW)
    # One offset a batch: the two clocks drift by parts in a million.
    rows["time_ns"] = read["time_ns"] + np.uint64(time.time_ns() - time.monotonic_ns())
    rows["connection_id"] = read["connection_id"]
    rows["network_namespace"] = read["network"]
    for name in _COPIED:
        rows[name] = read[name]
    for end in ("local", "remote"):
        halves = np.ascontiguousarray(read[end]).view(">u8")
        rows[f"{end}_high"], rows[f"{end}_low"] = halves[:, 0], halves[:, 1]
    names, of_row = np.unique(read["name"], return_inverse=True)
    rows["comm"] = len(RESET_REASONS) + of_row
    known = read["reason"] < len(RESET_REASONS)
    rows["reason"] = np.where(known, read["reason"], 0)
    strings = (*RESET_REASONS, *(name.decode(errors="replace") for name in names.tolist()))
    return EventRows(pb.TcpStateChange, rows, strings)
