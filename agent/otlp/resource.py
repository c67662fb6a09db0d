"""Who says it: the resource and the scope of what is exported."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Final

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1 import resource_pb2

from coral.wire.series import Service

_AGENT: Final = "coral-agent"


def text(key: str, value: str) -> KeyValue:
    """A text as an attribute. What is not UTF-8, as a name from /proc can be, is escaped."""
    encoded = value.encode(errors="backslashreplace").decode()
    return KeyValue(key=key, value=AnyValue(string_value=encoded))


def number(key: str, value: int) -> KeyValue:
    """A whole number as an attribute."""
    return KeyValue(key=key, value=AnyValue(int_value=value))


class Resource:
    """The attributes of this machine and agent, with EXTRA ones of the configuration."""

    def __init__(self, agent_id: str, extra: Mapping[str, str]) -> None:
        self.scope = InstrumentationScope(name="coral", version=version("coral-ebpf-agent"))
        self._attributes = [
            text("host.name", platform.node()),
            text("host.arch", platform.machine()),
            text("os.type", "linux"),
            text("coral.agent.id", agent_id),
            *(text(key, value) for key, value in extra.items()),
        ]

    def of(self, service: str) -> resource_pb2.Resource:
        """The resource of SERVICE, or of the agent itself."""
        name = text("service.name", service or _AGENT)
        of_pods = service.attributes if isinstance(service, Service) else {}
        more = [text(key, value) for key, value in of_pods.items() if key != "service.name"]
        return resource_pb2.Resource(attributes=[name, *more, *self._attributes])
