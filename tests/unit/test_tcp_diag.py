"""Figures of `sock_diag` as those of a connection, where the kernel has read them one by one."""

from __future__ import annotations

import numpy as np
import pytest

from coral.bpf.probing.sock_diag import SOCKET
from coral.collectors.tcp_metrics.diag import _CLIENT, _ESTABLISHED, _SERVER, _count

RECORD = np.dtype(
    [
        ("role", "u1"), ("state", "u1"), ("read_ns", "u8"),
        *((name, "u8") for name in (
            "bytes_sent", "bytes_acked", "bytes_received", "bytes_retransmitted", "segments_sent",
            "segments_received", "retransmits", "rtt_min_us", "congestion_window",
            "slow_start_threshold", "segment_bytes", "srtt_us", "rtt_deviation_us", "listen_drops",
            "backlog", "backlog_limit",
        )),
    ]
)  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "counted"),
    [
        ((1215, 0, 1215, 0, 0), 1215),
        ((1215, 0, 1029, 186, 0), 1215),
        ((1215, 0, 1215, 186, 0), 1215),  # acknowledged after `unacked` was read
        ((1215, 0, 1215, 372, 186), 1215),
        ((1029, 0, 1029, 186, 186), 1029),  # waits in the socket
        ((1401, 0, 1215, 0, 0), 1215),  # once dropped before it left the machine
        ((1401, 186, 1029, 186, 0), 1215),
        ((1215, 186, 1215, 0, 0), 1215),  # never less than what the peer has
        ((0, 0, 1029, 186, 0), 1215),  # a kernel before 4.19
    ],
)
@pytest.mark.parametrize("role", [_CLIENT, _SERVER])
def test_no_byte_that_is_acknowledged_meanwhile_counts_twice(
    role: int, kernel: tuple[int, int, int, int, int], counted: int
) -> None:
    """KERNEL: bytes sent, retransmitted, acknowledged, queued, and those of them not yet sent."""
    sent, retransmitted, acked, unacked, unsent = kernel
    records, sockets = np.zeros(1, RECORD), np.zeros(1, SOCKET)
    records["role"] = role
    message, info = sockets["socket"], sockets["info"]
    message["state"], message["unacked"] = _ESTABLISHED, unacked
    info["bytes_sent"], info["bytes_retransmitted"] = sent, retransmitted
    info["bytes_acked"], info["unsent"] = acked + (role == _CLIENT), unsent
    _count(records, sockets)
    assert records["bytes_sent"].tolist() == [counted]
    assert records["bytes_acked"].tolist() == [acked]
