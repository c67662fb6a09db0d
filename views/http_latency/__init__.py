"""What a person sees of `http_latency`."""

from __future__ import annotations

from typing import Final

from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.contract import EVENTS, INTERVAL, Flag, View
from coral.views.http_latency.provoke import PROVOCATION
from coral.views.http_latency.story import HttpStory

VIEW: Final = View(
    kind=pb.EBPF_COLLECTOR_KIND_HTTP_LATENCY,
    about="HTTP requests: times, statuses, bytes.",
    story=lambda _: HttpStory(),
    flags=(
        EVENTS,
        INTERVAL,
        Flag(
            "--routes",
            "Patterns of paths that are one route each, such as /users/{id}, comma-separated.",
            key="routes",
            metavar="PATTERNS",
        ),
    ),
    cheaper="watch fewer processes",
    provocation=PROVOCATION,
)
