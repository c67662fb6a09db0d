"""The command names of the processes in a session's records, by array.

The session's records tell of each process before its first event, and of its new name when it has
one. A process that ran at the start is looked up when it is first seen; all are, again, when there
was no room for such a record.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from coral.collectors.columns import Strings
from coral.collectors.members import comm_text, process_keys
from coral.collectors.targets import Targets

_NAMED, _ENDED = 2, 3  # enum change of targets.bpf.h


class ProcessNames:
    """The names of the processes of one session, as indices of strings."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._names: dict[int, bytes] = {}  # by process
        self._untold = 0
        self.forget_indices()

    def forget_indices(self) -> None:
        """Call it when the strings change that the indices belong to."""
        self._keys = np.empty(0, np.uint64)  # processes, sorted
        self._of_key = np.empty(0, np.uint32)  # index of the command name, for each of `_keys`

    def learn(self, changes: NDArray[Any]) -> None:
        """Takes in CHANGES, struct process_change of shape (n,): before the events of the same
        drain."""
        if (untold := self._targets.untold_changes) != self._untold:
            self._untold = untold
            self._names.clear()
            self.forget_indices()
        if len(changes):
            keys = process_keys(changes["tgid"], changes["born"])
            self._names.update(zip(keys.tolist(), changes["comm"].tolist(), strict=True))
            self._drop(keys[changes["change"] == _NAMED])

    def indices(
        self, pids: NDArray[Any], born: NDArray[Any], strings: Strings
    ) -> NDArray[np.uint32]:
        """The indices in STRINGS of the names of the processes PIDS that were BORN then, all of
        shape (n,)."""
        keys = process_keys(pids, born)
        found, known = self._look_up(keys)
        if not known.all():
            self._add(np.unique(keys[~known]), strings)
            found, _ = self._look_up(keys)
        return self._of_key[found]

    def forget(self, changes: NDArray[Any]) -> None:
        """Forgets the processes that have ended, by CHANGES: after the events of the same drain."""
        if not len(changes):
            return
        ended = changes[changes["change"] == _ENDED]
        keys = process_keys(ended["tgid"], ended["born"])
        for key in keys.tolist():
            self._names.pop(key, None)
        self._drop(keys)

    def _look_up(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        if not len(self._keys):
            return np.zeros(len(keys), np.intp), np.zeros(len(keys), bool)
        found = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return found, self._keys[found] == keys

    def _add(self, keys: NDArray[np.uint64], strings: Strings) -> None:
        comms = [self._name_of(key) for key in keys.tolist()]
        indices = np.array([strings.index(comm_text(comm)) for comm in comms], np.uint32)
        order = np.argsort(merged := np.concatenate([self._keys, keys]))
        self._keys = merged[order]
        self._of_key = np.concatenate([self._of_key, indices])[order]

    def _name_of(self, key: int) -> bytes:
        if key not in self._names:
            self._names[key] = self._targets.name_of(key)
        return self._names[key]

    def _drop(self, keys: NDArray[np.uint64]) -> None:
        if len(keys):
            kept = ~np.isin(self._keys, keys)
            self._keys, self._of_key = self._keys[kept], self._of_key[kept]
