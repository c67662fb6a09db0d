"""Which kinds of collectors this agent has. A new one is a name here, of a folder beside this file.

The folder's `collector.py` has a variable `COLLECTOR`, its subclass of `Collector`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Final

from coral.collectors.contract import Collector

_FOLDERS: Final = (
    "syscall_stats",
    "tcp_metrics",
    "http_latency",
    "cpu_profile",
)


def _collector(folder: str) -> type[Collector]:
    found = import_module(f"coral.collectors.{folder}.collector").COLLECTOR
    if not (isinstance(found, type) and issubclass(found, Collector)):
        raise TypeError(f"coral.collectors.{folder}.collector.COLLECTOR is no Collector")
    return found


COLLECTORS: Final[Mapping[int, type[Collector]]] = {
    collector.kind: collector for collector in map(_collector, _FOLDERS)
}
