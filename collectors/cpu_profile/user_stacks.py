"""The user stacks of samples: by frame pointers, as the kernel followed them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from coral.collectors.cpu_profile.frames import UserStacks
from coral.collectors.cpu_profile.ragged import Ragged
from coral.collectors.cpu_profile.samples import BY_FRAMES, NO_USER, STACK_CUT, Samples
from coral.mesh.v1 import ebpf_pb2 as pb


def by_frame_pointers(samples: Samples) -> UserStacks:
    """The stacks that the kernel has followed."""
    addresses = samples.user_frames
    followed = samples.has(BY_FRAMES)
    ends = np.full(len(samples), pb.CPU_STACK_END_FRAME_POINTERS, np.uint32)
    ends[samples.has(STACK_CUT) & followed] = pb.CPU_STACK_END_TOO_MANY_FRAMES
    ends[samples.has(NO_USER)] = pb.CPU_STACK_END_NO_USER_STACK
    unwinding = np.where(followed, np.uint32(pb.CPU_UNWINDING_FRAME_POINTERS), 0)
    return UserStacks(
        addresses, addresses.places > 0, np.zeros(len(addresses.flat), bool), ends, unwinding
    )


def ips(samples: Samples) -> Ragged:
    """Where each sample was in user space, as a stack of one frame; of kernel threads, of none."""
    has_user = ~samples.has(NO_USER)
    registers = samples.structs["registers"]
    ip: NDArray[np.uint64] = registers["ip" if "ip" in (registers.dtype.names or ()) else "pc"]
    return Ragged(ip[has_user], has_user.astype(np.int64))
