"""What the contract calls the losses that programs count (account.bpf.h)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from coral.bpf.buffers.account import PROGRAM_MISSED
from coral.mesh.v1 import ebpf_pb2 as pb

# By the constants of `enum loss` without their prefix.
STAGES: Final[Mapping[str, int]] = {
    "BUFFER_FULL": pb.Loss.STAGE_KERNEL_BUFFER,
    "MAP_FULL": pb.Loss.STAGE_MAP_FULL,
    "BUSY": pb.Loss.STAGE_KERNEL_BUSY,
    "TRUNCATED": pb.Loss.STAGE_TRUNCATED,
    PROGRAM_MISSED: pb.Loss.STAGE_PROGRAM_MISSED,
}


def by_stage(lost: Mapping[str, int]) -> dict[int, int]:
    """LOST, by reason, as counts by `pb.Loss.Stage`. KeyError for a reason that has no stage."""
    return {STAGES[reason]: count for reason, count in lost.items()}
