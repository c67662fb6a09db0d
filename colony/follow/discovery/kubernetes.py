"""Agents behind a Service of Kubernetes: the addresses in its EndpointSlices (discovery.k8s.io/v1),
listed once and then watched.

An agent that is not ready is followed too, because it may still tell what it sees; one that is
being deleted ends its sessions itself.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Final
from urllib.parse import urlencode

import structlog

from coral.colony.follow.discovery.addresses import joined
from coral.colony.follow.discovery.http_json import GoneError, HttpError, Server
from coral.colony.follow.discovery.left_out import Troubles
from coral.colony.follow.discovery.pace import Pace
from coral.colony.follow.discovery.slices import (
    MOST_SLICES,
    Change,
    Slice,
    Slices,
    mapping,
    name_of,
    read_change,
    read_slice,
)
from coral.colony.follow.discovery.source import Found

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_SERVICE_LABEL: Final = "kubernetes.io/service-name"
_PAGE: Final = 500
_WATCH_S: Final = 300  # after which the server ends a watch
_IDLE_S: Final = 330.0
_GONE: Final = 410
_MOST_REASON: Final = 300
_AT_ONCE: Final = "the server ends each watch at once"


class Endpoints:
    """The endpoints of SERVICE, in NAMESPACE, with their PORT: its name or its number. CLOCK and
    SLEEP are in seconds."""

    def __init__(
        self,
        server: Server,
        namespace: str,
        service: str,
        port: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._server = server
        self._path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self._selected = {"labelSelector": f"{_SERVICE_LABEL}={service}"}
        self._port = port
        self._clock = clock
        self._sleep = sleep
        self._slices = Slices(f"{namespace}/{service}")
        self._lines = Troubles("lines of a watch are left out", service=f"{namespace}/{service}")
        self._pace = Pace()
        self._began_s = clock()  # the watch
        self._changes = 0  # of the watch
        self._missed: dict[str, str] = {}  # of the watch
        self._told = ""  # why there is no answer

    async def follow(self, found: Found) -> None:
        """See `Source`."""
        while True:
            try:
                version = await self._list()
                self._tell(found)
                await self._watches(version, found)
                continue
            except GoneError:
                pass  # they are listed again
            except HttpError as error:
                self._fails(str(error))
            await self._sleep(self._pace.failed(self._clock() - self._began_s))

    def _tell(self, found: Found) -> None:
        found(self._slices.addresses())

    def _fails(self, reason: str) -> None:
        if reason != self._told:
            log.warning("agents.kubernetes has no answer", reason=reason)
        self._told = reason

    async def _list(self) -> str:
        """The version of what there is now."""
        self._began_s = self._clock()
        slices: list[Slice] = []
        more = version = ""
        while True:
            query = {**self._selected, "limit": _PAGE, **({"continue": more} if more else {})}
            page = await self._server.get(f"{self._path}?{urlencode(query)}")
            items = page.get("items", False)
            if not isinstance(items, list | None):
                raise HttpError(f"{self._server.url}: the answer is no list")
            slices += (read_slice(item, self._port) for item in items or ())
            told = mapping(page.get("metadata"))
            version, more = str(told.get("resourceVersion", "")), str(told.get("continue") or "")
            if not more or len(slices) > MOST_SLICES:
                break
        self._slices.listed(slices)
        return version

    async def _watches(self, version: str, found: Found) -> None:
        """One watch after another, until a change was missed: they have to be listed again."""
        self._missed = {}
        while not self._missed:
            version = await self._watch(version, found)
            self._lines.are(self._missed)  # which are over, where this one had none
            pause_s = self._pace.ended(self._clock() - self._began_s, self._changes)
            if self._pace.is_slow:
                self._fails(f"{self._server.url}: {_AT_ONCE}")
            else:
                self._told = ""
            await self._sleep(pause_s)

    async def _watch(self, version: str, found: Found) -> str:
        """What changes after VERSION, until the server ends the watch; the version then."""
        query = {
            **self._selected,
            "watch": 1,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": _WATCH_S,
            "resourceVersion": version,
        }
        self._began_s, self._changes = self._clock(), 0
        path = f"{self._path}?{urlencode(query)}"
        async with aclosing(self._server.lines(path, _IDLE_S)) as lines:
            async for line in lines:
                try:
                    change = read_change(line)
                except ValueError as error:
                    self._missed = {"": str(error)}
                    self._lines.are(self._missed)
                    continue
                self._apply(change)
                self._changes += 1
                version = change.version or version
                self._tell(found)
        return version

    def _apply(self, change: Change) -> None:
        """Raises `HttpError` where it is the end of the watch."""
        if change.what == "ERROR":
            code, message = change.item.get("code"), change.item.get("message")
            words = f"the watch failed: {code}: {message}"[:_MOST_REASON]
            error = GoneError if code == _GONE else HttpError
            raise error(f"{self._server.url}: {words}")
        if change.what == "DELETED":
            self._slices.drop(name_of(change.item))
        elif change.what != "BOOKMARK":
            self._slices.put(read_slice(change.item, self._port))


def server_in_cluster(environment: Mapping[str, str] = os.environ) -> str:
    """The address of the API server, of which Kubernetes tells its pods. Raises ValueError outside
    of a pod."""
    host, port = (environment.get(f"KUBERNETES_SERVICE_{name}") for name in ("HOST", "PORT"))
    if not host:
        raise ValueError("this is no pod, which knows its API server: name it")
    return f"https://{joined(host, int(port or 443))}"
