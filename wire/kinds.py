"""The kinds of collectors, by the names that users write."""

from __future__ import annotations

from typing import Final

from coral.mesh.v1 import ebpf_pb2 as pb

_PREFIX: Final = "EBPF_COLLECTOR_KIND_"


def kind_name(kind: int) -> str:
    """`syscall_stats` and its like: the kind's name as users write it; a number where the contract
    has no such kind."""
    names = pb.EbpfCollectorKind.DESCRIPTOR.values_by_number
    return names[kind].name.removeprefix(_PREFIX).lower() if kind in names else str(kind)


def kind_of(name: str) -> int:
    """The kind that NAME names. Raises ValueError."""
    return pb.EbpfCollectorKind.Value(_PREFIX + name.upper())
