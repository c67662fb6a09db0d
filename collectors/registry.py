"""Which collectors this agent has. A new one is a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from collectors.base import Collector
from collectors.syscall_stats import SyscallStatsCollector
from collectors.tcp_metrics import TcpMetricsCollector
from proto.coral.mesh.v1 import ebpf_pb2 as pb

COLLECTORS: Final[Mapping[int, type[Collector]]] = {
    cls.kind: cls for cls in (SyscallStatsCollector, TcpMetricsCollector)
}

_PREFIX: Final = "EBPF_COLLECTOR_KIND_"


def kind_name(kind: int) -> str:
    """`syscall_stats` and its like: the kind's name as users write it."""
    return pb.EbpfCollectorKind.Name(kind).removeprefix(_PREFIX).lower()


def kind_of(name: str) -> int:
    """The kind that NAME names. Raises ValueError."""
    return pb.EbpfCollectorKind.Value(_PREFIX + name.upper())
