"""What a person sees of `tcp_metrics`."""

from __future__ import annotations

from typing import Final

from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.contract import EVENTS, INTERVAL, Flag, View
from coral.views.names import Names
from coral.views.tcp_metrics.provoke import PROVOCATION
from coral.views.tcp_metrics.story import TcpStory

_RESOLVE: Final = Flag("--resolve", "Show addresses by name, where known.")

VIEW: Final = View(
    kind=pb.EBPF_COLLECTOR_KIND_TCP_METRICS,
    about="TCP connections: bytes, losses, failures.",
    story=lambda given: TcpStory(Names() if _RESOLVE.name in given else None),
    flags=(EVENTS, INTERVAL, _RESOLVE),
    cheaper="add connections up by peer with -c by=peer",
    provocation=PROVOCATION,
)
