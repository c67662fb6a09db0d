"""Which collectors this agent has. A new one is a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from coral.collectors.contract import Collector
from coral.collectors.syscall_stats.collector import SyscallStatsCollector
from coral.collectors.tcp_metrics.collector import TcpMetricsCollector

COLLECTORS: Final[Mapping[int, type[Collector]]] = {
    cls.kind: cls for cls in (SyscallStatsCollector, TcpMetricsCollector)
}
