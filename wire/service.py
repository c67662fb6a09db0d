"""A service as a label of metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self


class Service(str):
    """The label `service` of what is of pods, with MORE labels that come with it, and the same as
    ATTRIBUTES of a resource of OpenTelemetry. Services of one name with other labels are others."""

    more: Mapping[str, str]
    attributes: Mapping[str, str]
    __slots__ = ("attributes", "more")

    def __new__(cls, name: str, more: Mapping[str, str], attributes: Mapping[str, str]) -> Self:
        """A text with these."""
        service = super().__new__(cls, name)
        service.more, service.attributes = dict(more), dict(attributes)
        return service

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True and getattr(other, "more", {}) == self.more

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((str(self), *self.more.items()))
