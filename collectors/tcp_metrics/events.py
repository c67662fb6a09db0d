"""Single events of connections: rows made from the kernel's records by array, not by event."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.clock import CLOCK
from coral.collectors.columns import Strings
from coral.collectors.contract import EventRows
from coral.collectors.members import comm_text
from coral.collectors.resources import ResourceTable
from coral.collectors.tcp_metrics.names import reset_reason
from coral.mesh.v1 import ebpf_pb2 as pb

_COPIED: Final = (
    "pid", "local_port", "remote_port", "role", "what", "old_state", "new_state", "count", "error",
    "end", "scope_id",
)  # fmt: skip
_ROW: Final = np.dtype(
    [
        ("time_ns", "<i8"),
        ("connection_id", "<u8"),
        *((f"{end}_{half}", "<u8") for end in ("local", "remote") for half in ("high", "low")),
        *((name, "<u4") for name in (*_COPIED, "comm", "reason", "network_namespace")),
    ]
)


_ROW_OF_PODS: Final = np.dtype([*_ROW.descr, ("resource", "<u4")])


def event_rows(read: NDArray[Any], table: ResourceTable | None = None) -> EventRows:
    """The rows of READ, struct tcp_event of shape (n,): with Unix time, addresses as numbers, and
    names; with TABLE, with their resources."""
    rows = np.empty(len(read), _ROW_OF_PODS if table else _ROW)
    if table:
        rows["resource"] = table.indices(read["group"])
    rows["time_ns"] = CLOCK.unix_ns(read["time_ns"])
    rows["connection_id"] = read["connection_id"]
    rows["network_namespace"] = read["network"]
    for name in _COPIED:
        rows[name] = read[name]
    for end in ("local", "remote"):
        halves = np.ascontiguousarray(read[end]).view(">u8")
        rows[f"{end}_high"], rows[f"{end}_low"] = halves[:, 0], halves[:, 1]
    strings = Strings()
    rows["comm"] = strings.indices(read["name"], comm_text)
    rows["reason"] = strings.indices(read["reason"], reset_reason)
    told = table.resources if table else ()
    return EventRows(pb.TcpStateChange, rows, strings.table, resources=told)
