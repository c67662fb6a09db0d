"""Hubs: programs that are loaded once and serve many sessions.

A process that nobody watches pays for each program at a hook. So all sessions of a kind share one
loaded object, a hub, and all hubs share the object `processes`, which keeps the processes that each
session watches. A session has a slot: its number in masks, and in maps that hold its own maps.
The C side is bpf/include/sessions.bpf.h.
"""

from coral.collectors.hubs.group import HINTS, HUBS
from coral.collectors.hubs.plan import Plan, has_cgroups
from coral.collectors.hubs.slot import FIRST_ENDED, Slot, SlotReader

__all__ = ["FIRST_ENDED", "HINTS", "HUBS", "Plan", "Slot", "SlotReader", "has_cgroups"]
