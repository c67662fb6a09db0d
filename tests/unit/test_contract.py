"""The fixed part of the contract, number by number: clients in the field depend on it."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto

from coral.mesh.v1 import ebpf_pb2 as pb

FIXED: dict[str, dict[str, tuple[int, str]]] = {
    "EbpfCapabilities": {
        "supported": (1, "bool"), "kernel_version": (2, "string"), "btf_available": (3, "bool"),
        "cap_bpf": (4, "bool"), "available_collectors": (5, "enum"),
    },
    "StartEbpfCollectorRequest": {
        "agent_id": (1, "string"), "service_name": (2, "string"), "kind": (3, "enum"),
        "config": (4, "message"), "duration": (5, "message"),
    },
    "StartEbpfCollectorResponse": {
        "collector_id": (1, "string"), "expires_at": (2, "message"), "supported": (3, "bool"),
        "error": (4, "string"),
    },
    "StopEbpfCollectorRequest": {"collector_id": (1, "string")},
    "StopEbpfCollectorResponse": {"success": (1, "bool"), "error": (2, "string")},
    "EbpfEventStreamRequest": {"collector_id": (1, "string")},
    "SyscallStats": {
        "syscall_name": (1, "string"), "call_count": (2, "uint64"), "error_count": (3, "uint64"),
        "total_duration_us": (4, "uint64"), "labels": (5, "message"),
    },
    "HttpLatencyHistogram": {
        "buckets": (1, "double"), "counts": (2, "uint64"), "unit": (3, "string"),
        "labels": (4, "message"),
    },
    "CpuProfileSample": {
        "stack": (1, "string"), "count": (2, "uint64"), "labels": (3, "message"),
    },
    "EbpfEvent": {
        "timestamp": (1, "message"), "collector_id": (2, "string"), "agent_id": (3, "string"),
        "service_name": (4, "string"), "syscall_stats": (10, "message"),
        "http_latency": (11, "message"), "cpu_profile": (12, "message"),
    },
}  # fmt: skip
TYPES = {1: "double", 4: "uint64", 8: "bool", 9: "string", 11: "message", 14: "enum"}


@pytest.mark.parametrize("message", FIXED)
def test_the_fixed_fields_keep_name_number_and_type(message: str) -> None:
    fields = pb.DESCRIPTOR.message_types_by_name[message].fields
    old = {f.name: (f.number, TYPES[f.type]) for f in fields if f.number < 100}
    assert old == FIXED[message]


def test_numbers_of_others_are_reserved() -> None:
    proto = DescriptorProto()
    pb.EbpfEvent.DESCRIPTOR.CopyToProto(proto)
    assert [(r.start, r.end) for r in proto.reserved_range] == [(20, 40)]


def test_kinds_and_service_keep_their_names() -> None:
    assert dict(pb.EbpfCollectorKind.items()) == {
        "EBPF_COLLECTOR_KIND_UNSPECIFIED": 0,
        "EBPF_COLLECTOR_KIND_SYSCALL_STATS": 1,
        "EBPF_COLLECTOR_KIND_HTTP_LATENCY": 2,
        "EBPF_COLLECTOR_KIND_CPU_PROFILE": 3,
        "EBPF_COLLECTOR_KIND_TCP_METRICS": 4,
    }
    service = pb.DESCRIPTOR.services_by_name["EbpfService"]
    assert service.full_name == "coral.mesh.v1.EbpfService"
    methods = {m.name: (m.input_type.name, m.output_type.name, m.server_streaming)
               for m in service.methods}  # fmt: skip
    assert methods["StartCollector"] == (
        "StartEbpfCollectorRequest", "StartEbpfCollectorResponse", False,
    )  # fmt: skip
    assert methods["StopCollector"] == (
        "StopEbpfCollectorRequest", "StopEbpfCollectorResponse", False,
    )  # fmt: skip
    assert methods["StreamEvents"] == ("EbpfEventStreamRequest", "EbpfEvent", True)
