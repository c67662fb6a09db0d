"""Paths of requests as text, with their routes: made once for each path and then found by its hash,
by array."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from coral.collectors.columns import group
from coral.collectors.http_latency.routes import CUT, Routes
from coral.wire.text import is_printable

_MOST_PATHS: Final = 16_384
_CUT_FLAG: Final = 1  # PATH_CUT of connection.bpf.h
_NO_PATH: Final = np.uint64(0)  # in place of a hash


def path_text(path: bytes) -> str:
    """PATH, or another part of a head, as text: percent-escapes for bytes that are not UTF-8, and
    for characters that a terminal or a log would act on."""
    text = path.decode(errors="surrogateescape")
    if is_printable(text):
        return text
    return "".join(
        char if is_printable(char) else quote(char, safe="", errors="surrogateescape")
        for char in text
    )


class Paths:
    """The paths of one session: as many as are in use, of which few more are kept."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._forget()

    def _forget(self) -> None:
        self._collapses = self._routes.collapses
        self._hashes = np.empty(0, np.uint64)  # sorted
        self._of_hash = np.empty(0, np.intp)  # the number of the path of each
        self._route_of_path = np.empty(0, np.intp)
        self.texts: list[str] = []
        """Paths by number."""
        self._route_numbers: dict[str, int] = {}
        self.routes: list[str] = []
        """Routes by number."""

    def find(self, records: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The numbers of the paths and of the routes of RECORDS, struct http_exchange, each of
        shape (n,). They are valid until the next call."""
        if len(self.texts) > _MOST_PATHS:
            self._forget()
        # The path of a request that had no room is not there, though its hash is.
        hashes = np.where(records["path_bytes"] > 0, records["path_hash"], _NO_PATH)
        # What collapses one place may do so for paths that were found before.
        for _ in range(2):
            if self._routes.collapses != self._collapses:
                self._forget()
            at, known = self._look_up(hashes)
            if not known.all():
                self._add(hashes[~known], records[~known])
                at, _ = self._look_up(hashes)
            if self._routes.collapses == self._collapses:
                break
        paths = self._of_hash[at]
        return paths, self._route_of_path[paths]

    def _look_up(self, hashes: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        if not len(self._hashes):
            return np.zeros(len(hashes), np.intp), np.zeros(len(hashes), bool)
        at = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        return at, self._hashes[at] == hashes

    def _add(self, hashes: NDArray[np.uint64], records: NDArray[Any]) -> None:
        first, _ = group(hashes)
        number = len(self.texts)
        characters = np.ascontiguousarray(records["path"][first]).view(np.uint8)
        characters = characters.reshape(len(first), -1)
        lengths = records["path_bytes"][first].tolist()
        cut = (records["path_flags"][first] & _CUT_FLAG).tolist()
        routes = []
        for raw, length, is_cut in zip(characters, lengths, cut, strict=True):
            text = path_text(raw[:length].tobytes()) + (CUT if is_cut else "")
            self.texts.append(text)
            routes.append(self._route_number(self._routes.route_of(text)))
        self._route_of_path = np.append(self._route_of_path, np.array(routes, np.intp))
        numbers = np.arange(number, len(self.texts))
        merged = np.concatenate([self._hashes, hashes[first]])
        order = np.argsort(merged)
        self._hashes = merged[order]
        self._of_hash = np.concatenate([self._of_hash, numbers])[order]

    def _route_number(self, route: str) -> int:
        number = self._route_numbers.setdefault(route, len(self.routes))
        if number == len(self.routes):
            self.routes.append(route)
        return number
