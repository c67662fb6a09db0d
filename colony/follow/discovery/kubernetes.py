"""Agents behind a Service of Kubernetes: the addresses in its EndpointSlices (discovery.k8s.io/v1),
listed once and then watched.

An agent that is not ready is followed too, because it may still tell what it sees; one that is
being deleted ends its sessions itself.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import structlog

from coral.colony.follow.discovery.addresses import joined
from coral.colony.follow.discovery.http_json import GoneError, HttpError, Server
from coral.colony.follow.discovery.source import Found

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_SERVICE_LABEL: Final = "kubernetes.io/service-name"
_PAGE: Final = 500
_WATCH_S: Final = 300  # after which the server ends a watch
_IDLE_S: Final = 330.0
_LEAST_PAUSE_S: Final = 1.0
_MOST_PAUSE_S: Final = 60.0


class Endpoints:
    """The endpoints of SERVICE, in NAMESPACE, with their PORT: its name or its number."""

    def __init__(self, server: Server, namespace: str, service: str, port: str) -> None:
        self._server = server
        self._path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self._selected = {"labelSelector": f"{_SERVICE_LABEL}={service}"}
        self._port = port
        self._slices: dict[str, frozenset[str]] = {}  # by their names

    async def follow(self, found: Found) -> None:
        """See `Source`."""
        pause_s, failed = _LEAST_PAUSE_S, False
        while True:
            try:
                version = await self._list()
                self._tell(found)
                pause_s, failed = _LEAST_PAUSE_S, False
                while True:
                    version = await self._watch(version, found)
            except GoneError:
                await asyncio.sleep(_LEAST_PAUSE_S)  # then list them again
            except HttpError as error:
                if not failed:
                    log.warning("agents.kubernetes has no answer", reason=str(error))
                failed = True
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _MOST_PAUSE_S)

    def _tell(self, found: Found) -> None:
        found(frozenset[str]().union(*self._slices.values()))

    async def _list(self) -> str:
        slices: dict[str, frozenset[str]] = {}
        more = version = ""
        while True:
            query = {**self._selected, "limit": _PAGE, **({"continue": more} if more else {})}
            page = await self._server.get(f"{self._path}?{urlencode(query)}")
            for item in page.get("items") or ():
                slices[_name(item)] = addresses_of(item, self._port)
            told = page.get("metadata") or {}
            version, more = str(told.get("resourceVersion", "")), str(told.get("continue", ""))
            if not more:
                break
        self._slices = slices
        return version

    async def _watch(self, version: str, found: Found) -> str:
        """What changes after VERSION, until the server ends the watch; the version then."""
        query = {
            **self._selected,
            "watch": 1,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": _WATCH_S,
            "resourceVersion": version,
        }
        async for line in self._server.lines(f"{self._path}?{urlencode(query)}", _IDLE_S):
            event = _mapping(json.loads(line))
            what, item = str(event.get("type")), _mapping(event.get("object"))
            if what == "ERROR":
                raise GoneError(str(item.get("message", "the watch failed")))
            version = str(_mapping(item.get("metadata")).get("resourceVersion", version))
            if what == "DELETED":
                self._slices.pop(_name(item), None)
            elif what != "BOOKMARK":
                self._slices[_name(item)] = addresses_of(item, self._port)
            self._tell(found)
        return version


def addresses_of(item: Mapping[str, Any], port: str) -> frozenset[str]:
    """The addresses in an EndpointSlice, with its port of that name or number."""
    number = next(
        (
            each["port"]
            for each in item.get("ports") or ()
            if each.get("port") and port in (each.get("name") or "", str(each["port"]))
        ),
        int(port) if port.isdigit() else None,
    )
    if number is None:
        return frozenset()
    return frozenset(
        joined(str(endpoint["addresses"][0]), int(number))
        for endpoint in item.get("endpoints") or ()
        if endpoint.get("addresses")
    )


def _name(item: Mapping[str, Any]) -> str:
    return str(_mapping(item.get("metadata")).get("name", ""))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def server_in_cluster(environment: Mapping[str, str] = os.environ) -> str:
    """The address of the API server, of which Kubernetes tells its pods. Raises ValueError outside
    of a pod."""
    host, port = (environment.get(f"KUBERNETES_SERVICE_{name}") for name in ("HOST", "PORT"))
    if not host:
        raise ValueError("this is no pod, which knows its API server: name it")
    return f"https://{joined(host, int(port or 443))}"
