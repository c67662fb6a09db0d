"""Whatever is in a request, it is bounded before any work is done."""

from __future__ import annotations

import pytest

from coral.agent.errors import InvalidRequestError, LimitError
from coral.agent.serving.requests import parse
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.text import is_printable, safe, safe_lines


def test_64_kib_are_parsed_and_a_byte_more_is_not() -> None:
    request = pb.StartEbpfCollectorRequest(config={"pid": "1" * 65_000})
    wire = request.SerializeToString()
    padding = b"\xfa\x7f"  # an unknown field of bytes, number 2047
    left = (64 << 10) - len(wire) - len(padding) - 2
    fits = wire + padding + bytes([left & 0x7F | 0x80, left >> 7]) + b"x" * left
    assert len(fits) == 64 << 10
    assert parse(pb.StartEbpfCollectorRequest, fits).config["pid"] == "1" * 65_000
    with pytest.raises(LimitError, match="request: 65,537 bytes are more than 65,536"):
        parse(pb.StartEbpfCollectorRequest, fits + b"x")


@pytest.mark.parametrize(
    "name", ["a\x1b[31mb", "a\nb", "a\u202eb", "a\x7f", "a\u2028b", "\ue000", "a\u200bb"]
)
def test_a_name_that_a_terminal_would_act_on_is_refused(name: str) -> None:
    for request in (
        pb.StartEbpfCollectorRequest(service_name=name),
        pb.StartEbpfCollectorRequest(agent_id=name),
        pb.StartEbpfCollectorRequest(config={name: "1"}),
        pb.StopEbpfCollectorRequest(collector_id=name),
        pb.EbpfEventStreamRequest(filter=pb.EventFilter(comms=["sh", name])),
        pb.EbpfEventStreamRequest(filter=pb.EventFilter(syscalls=[name])),
    ):
        with pytest.raises(InvalidRequestError, match="give printable text"):
            parse(type(request), request.SerializeToString())
    assert not is_printable(name)
    assert is_printable(safe(name))


def test_names_in_any_script_are_accepted() -> None:
    request = pb.StartEbpfCollectorRequest(service_name="dæmon-日本 [/x]")
    assert parse(type(request), request.SerializeToString()) == request


def test_the_door_keeps_the_lines_of_a_text_of_several() -> None:
    assert safe_lines("a\x1b\nb\r\nc\udcff") == "a?\nb?\nc?"
