"""The maps that a session has of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial

from coral.bpf import BpfObject
from coral.bpf.loading.map_definition import InnerMap
from coral.collectors.hubs.plan import MAPS_OF_PROCESSES, Plan


class Kit:
    """The maps of one session, by its plan, for the slot NUMBER. While LOCKS are held, the objects
    that it is installed in are not closed."""

    def __init__(self, plan: Plan, number: int, *, locks: Sequence[threading.Lock] = ()) -> None:
        self.name, self.sizes, self.number = plan.name, dict(plan.sizes), number
        self.locks = locks
        self.maps: dict[str, InnerMap] = {}
        self.is_ready = False  # for a session to take it, which is decided under the group's lock
        self._installed: list[tuple[BpfObject, str]] = []

    def is_like(self, other: Kit) -> bool:
        """Whether both have the same maps, of any size."""
        return (self.name, self.sizes.keys()) == (other.name, other.sizes.keys())

    def fits(self, plan: Plan) -> bool:
        """Whether a session by PLAN can use it."""
        return self.is_ready and (plan.name, plan.sizes) == (self.name, self.sizes)

    def install(self, processes: BpfObject, hub: BpfObject) -> None:
        """Makes the maps, and puts them where programs find them. Raises `BpfError`."""
        owners = {name: processes if name in MAPS_OF_PROCESSES else hub for name in self.sizes}
        for name, size in self.sizes.items():
            entries = None if name == "perfs" else size  # as many as there are CPUs
            self.maps[name] = owners[name].make_inner(name, entries)
        self._installed = [(owner, name) for name, owner in owners.items()]
        self._each(lambda owner, name: owner.install(name, self.number, self.maps[name].fd))

    @property
    def memory_bytes(self) -> int:
        """What the kernel charges for the maps once it waits for a session. Raises OSError."""
        return sum(own.memory_bytes for own in self.maps.values()) if self.is_ready else 0

    def uninstall(self, kept: Collection[str] = ()) -> None:
        """Takes the maps away from the programs, except for those KEPT; when this returns, none is
        still at work with them. They stay readable. Safe to call twice. Raises `BpfError`."""
        installed = [each for each in self._installed if each[1] not in kept]
        self._installed = [each for each in self._installed if each[1] in kept]
        self._each(lambda owner, name: owner.uninstall(name, self.number), installed)

    def _each(
        self,
        work: Callable[[BpfObject, str], None],
        maps: Sequence[tuple[BpfObject, str]] | None = None,
    ) -> None:
        maps = self._installed if maps is None else maps
        at_once([partial(work, *of) for of in maps])

    def close(self) -> None:
        """Frees the maps. Safe to call twice."""
        with ExitStack() as closing:
            for own in self.maps.values():
                closing.callback(own.close)
            closing.callback(self.uninstall)


class Background:
    """STEP, which another thread runs; where none can be started, it is done at once."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        self._error: Exception | None = None
        self._thread: threading.Thread | None = threading.Thread(target=self._run)
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = None
            self._run()

    def _run(self) -> None:
        try:
            self._step()
        except Exception as error:  # noqa: BLE001  `wait` raises it
            self._error = error

    @property
    def has_failed(self) -> bool:
        """Whether STEP has raised an exception."""
        return self._error is not None

    def end(self) -> None:
        """Returns when STEP is done, whatever came of it."""
        if self._thread:
            self._thread.join()

    def wait(self) -> None:
        """Returns when STEP is done; raises its exception. Can be called by several threads."""
        self.end()
        if self._error:
            raise self._error


def at_once(steps: Sequence[Callable[[], None]]) -> None:
    """Runs STEPS, in each of which the kernel waits for all running programs, at one time. Raises
    the exception of one that failed."""
    with ExitStack() as ending:
        for step in steps[1:]:
            ending.callback(Background(step).wait)
        for step in steps[:1]:
            step()
