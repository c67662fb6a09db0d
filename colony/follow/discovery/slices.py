"""EndpointSlices (discovery.k8s.io/v1) as their addresses. They come from a server, in whatever
form: what cannot be read is left out and told, and hides nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from coral.colony.follow.discovery.addresses import agent_address, joined
from coral.colony.follow.discovery.left_out import MOST_ADDRESSES, Bounded, Troubles

MOST_SLICES: Final = 10_000
_MOST_NAME: Final = 253  # of an object of Kubernetes
_MOST_PORT: Final = 65535
_CHANGES: Final = frozenset({"ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR"})
_NO_EVENT: Final = "it is no event in JSON"


@dataclass(frozen=True, slots=True)
class Slice:
    """The addresses in a slice. `trouble` says why it, or a part of it, is left out; a slice whose
    `name` is empty has no addresses."""

    name: str
    addresses: frozenset[str] = frozenset()
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """An event of a watch: `what` is its type, and `item` its object."""

    what: str
    item: Mapping[str, Any]

    @property
    def version(self) -> str:
        """The version of the list after it; empty where it has none."""
        version = mapping(self.item.get("metadata")).get("resourceVersion")
        return version if isinstance(version, str) else ""


class Slices:
    """The slices of SERVICE. One that was read before and cannot be read now keeps its
    addresses."""

    def __init__(
        self, service: str, most_slices: int = MOST_SLICES, most_addresses: int = MOST_ADDRESSES
    ) -> None:
        self._most = most_slices
        self._bounded = Bounded(f"agents.kubernetes: {service}", most_addresses)
        self._troubles = Troubles("EndpointSlices are left out", service=service)
        self._addresses: dict[str, frozenset[str]] = {}  # by their names
        self._bad: dict[str, str] = {}  # why, by their names

    def listed(self, slices: Iterable[Slice]) -> None:
        """SLICES are all there are."""
        before, self._addresses, self._bad = self._addresses, {}, {}
        for each in slices:
            self._put(each, before)
        self._troubles.are(self._bad)

    def put(self, changed: Slice) -> None:
        """One is new, or another than before."""
        self._put(changed, self._addresses)
        self._troubles.are(self._bad)

    def drop(self, name: str) -> None:
        """One is there no longer."""
        self._addresses.pop(name, None)
        self._bad.pop(name, None)
        self._troubles.are(self._bad)

    def addresses(self) -> frozenset[str]:
        """All that may be followed."""
        return self._bounded.of(frozenset[str]().union(*self._addresses.values()))

    def _put(self, one: Slice, before: Mapping[str, frozenset[str]]) -> None:
        if not one.name:
            self._bad[""] = one.trouble
        elif one.name not in self._addresses and len(self._addresses) >= self._most:
            self._bad[""] = f"there are more than {self._most}"
        else:
            was = before.get(one.name, frozenset()) if one.trouble else frozenset()
            self._addresses[one.name] = one.addresses or was
            self._bad.pop(one.name, None)
            if one.trouble:
                self._bad[one.name] = one.trouble


def read_slice(item: object, port: str) -> Slice:
    """A slice in the form of the API, with its port of that name or number."""
    if not isinstance(item, Mapping):
        return Slice("", trouble="it is no object")
    name = name_of(item)
    if not name:
        return Slice("", trouble="it has no name")
    try:
        number = _port(item, port)
        endpoints = _items(item, "endpoints")
    except ValueError as error:
        return Slice(name, trouble=str(error))
    if number is None:
        return Slice(name)
    addresses = [_address(endpoint, number) for endpoint in endpoints]
    trouble = "an endpoint has no address" if None in addresses else ""
    return Slice(name, frozenset(each for each in addresses if each), trouble)


def read_change(line: bytes) -> Change:
    """A line of a watch. Raises ValueError where it is no event."""
    try:
        event = mapping(json.loads(line))
    except (ValueError, RecursionError) as error:
        raise ValueError(_NO_EVENT) from error
    what = event.get("type")
    if not isinstance(what, str) or what not in _CHANGES:
        raise ValueError(_NO_EVENT)
    return Change(what, mapping(event.get("object")))


def name_of(item: Mapping[str, Any]) -> str:
    """The name of an object of the API; empty where it has none."""
    name = mapping(item.get("metadata")).get("name")
    return name if isinstance(name, str) and len(name) <= _MOST_NAME else ""


def mapping(value: object) -> Mapping[str, Any]:
    """VALUE, or nothing where it is no object."""
    return value if isinstance(value, Mapping) else {}


def _items(item: Mapping[str, Any], key: str) -> list[object]:
    """Raises ValueError where it is no list."""
    value = item.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"its {key} are no list")
    return value


def _port(item: Mapping[str, Any], port: str) -> int | None:
    """Raises ValueError where what PORT names is no port."""
    for each in map(mapping, _items(item, "ports")):
        number = each.get("port")
        if number and port in (each.get("name") or "", str(number)):
            if type(number) is not int or not 0 < number <= _MOST_PORT:
                raise ValueError("its port is no number of a port")
            return number
    return int(port) if port.isdigit() else None


def _address(endpoint: object, port: int) -> str | None:
    addresses = mapping(endpoint).get("addresses")
    if not isinstance(addresses, list) or not addresses or not isinstance(addresses[0], str):
        return None
    try:
        return agent_address(joined(addresses[0], port))
    except ValueError:
        return None
