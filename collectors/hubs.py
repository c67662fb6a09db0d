"""Hubs: programs that are loaded once and serve many sessions.

A process that nobody watches pays for each program at a hook. So all sessions of a kind share one
loaded object, a hub, and all hubs share the object `processes`, which keeps the processes that each
session watches. A session has a slot: its number in masks, and in maps that hold its own maps.
The C side is bpf/include/sessions.bpf.h.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from coral.bpf import BpfObject, HashMap, ProgramStats, Rung

HUBS: Final = ("syscall_stats", "tcp_metrics")  # as enum hub of sessions.bpf.h
_PROCESSES: Final = "processes"
_SHARED: Final = ("sessions", "changes", "members", "hints", "accounts")
_HINTS: Final = 16384  # as in targets.bpf.h
_REBUILD_AFTER: Final = 256  # processes that have ended since the hints were last built
_SELECTIONS: Final = ("host", "follow", "comm", "cgroup", "detailed")


@dataclass(frozen=True)
class HubPlan:
    """What a hub loads: the object NAME, one of HUBS, by the arguments of `Rung.object`. Sessions
    with equal plans on the same rung share a hub."""

    name: str
    rung: Rung
    programs: tuple[str, ...]
    options: Mapping[str, object] = field(hash=False)
    map_entries: Mapping[str, int] = field(default_factory=dict, hash=False)
    preallocated: tuple[str, ...] = ()
    walks: tuple[str, ...] = ()
    without_maps: tuple[str, ...] = ()
