"""A hub: what is loaded once for many sessions."""

from __future__ import annotations

import threading
from contextlib import suppress
from functools import partial

from coral.bpf import BpfError, BpfObject
from coral.bpf.attaching.link import Link
from coral.bpf.closing import close_all
from coral.collectors.hubs.kit import Background
from coral.collectors.hubs.plan import Plan


class Hub:
    """One loaded object and the sessions that use it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while it is loaded
        self.object: BpfObject | None = None
        self.slots: set[int] = set()
        self.links: dict[str, Link] = {}  # of the optional programs
        self.common: dict[object, object] = {}  # see `Slot.common`
        self.making = threading.Lock()  # held while something in common is made
        self.reading = threading.Lock()  # held while the one room for readings is used
        self.loading: Background | None = None  # while `object` is not yet to be used
        self.late: BpfObject | None = None  # with programs over the same maps
        self.loading_late: Background | None = None

    def wait(self) -> None:
        """Returns when `object` is loaded. Raises `BpfError` if that failed."""
        if self.loading:
            self.loading.wait()

    @property
    def objects(self) -> list[BpfObject]:
        """Those that are loaded."""
        return [loaded for loaded in (self.object, self.late) if loaded is not None]

    def begin_late(self, plan: Plan, number: int) -> None:
        """Has a thread load the late programs of PLAN, unless that is done: a session that does not
        use them has started long before they are verified. NUMBER is that of the hubs of this
        name."""
        with self.lock:
            loaded, before = self.object, self.loading_late
            if loaded is not None and (before is None or before.has_failed):
                self.loading_late = Background(partial(self._load_late, plan, number, loaded))

    def _load_late(self, plan: Plan, number: int, loaded: BpfObject) -> None:
        late = plan.late_part(number, loaded.map_fds(loaded.map_names))
        try:
            late.load()
        except BaseException:
            late.close()
            raise
        self.late = late

    def loaded_late(self) -> BpfObject:
        """The object with the late programs, when it is loaded. Raises `BpfError`."""
        if self.loading_late:
            self.loading_late.wait()
        if self.late is None:
            raise BpfError("these programs are not loaded")
        return self.late

    def close(self) -> None:
        """Closes what is loaded."""
        with self.lock:
            with suppress(Exception):  # those who wait for it are told
                self.wait()
            if self.loading_late:
                self.loading_late.end()
            close_all([loaded.close for loaded in reversed(self.objects)])
            self.object = self.late = self.loading_late = None
            self.common, self.links = {}, {}
