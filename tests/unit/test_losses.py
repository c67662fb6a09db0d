"""What programs count as lost, and what the contract calls it."""

from __future__ import annotations

import pytest

from coral.bpf.buffers.account import PROGRAM_MISSED
from coral.collectors.losses import STAGES, by_stage
from coral.mesh.v1 import ebpf_pb2 as pb


def test_every_reason_has_a_stage_of_its_own() -> None:
    assert by_stage({"BUFFER_FULL": 1, "MAP_FULL": 2, PROGRAM_MISSED: 3}) == {
        pb.Loss.STAGE_KERNEL_BUFFER: 1,
        pb.Loss.STAGE_MAP_FULL: 2,
        pb.Loss.STAGE_PROGRAM_MISSED: 3,
    }
    assert len(set(STAGES.values())) == len(STAGES)
    with pytest.raises(KeyError, match="NO_SUCH_REASON"):
        by_stage({"NO_SUCH_REASON": 1})
