"""The user stacks of samples: unwound from copies, or by frame pointers, as the kernel followed
them."""

from __future__ import annotations

import platform
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.cpu_profile.frames import Memory, UserStacks
from coral.collectors.cpu_profile.ragged import Ragged
from coral.collectors.cpu_profile.samples import (
    BY_FRAMES,
    NO_USER,
    STACK_CUT,
    STACK_HIDDEN,
    Samples,
)
from coral.collectors.unwinding.rules import ARM64, X86_64, Machine
from coral.collectors.unwinding.stacks import Frame
from coral.collectors.unwinding.stacks import Samples as Copies
from coral.collectors.unwinding.unwinder import Unwinder
from coral.mesh.v1 import ebpf_pb2 as pb

_MACHINES: Final = {"x86_64": X86_64, "aarch64": ARM64}
# The registers of ptrace(2) by their numbers in DWARF, the instruction pointer last.
_X86: Final = (
    "ax", "dx", "cx", "bx", "si", "di", "bp", "sp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "ip",
)  # fmt: skip


def machine() -> Machine | None:
    """The registers of this machine; None where stacks cannot be unwound."""
    return _MACHINES.get(platform.machine())


def unwound(samples: Samples, memory: Memory, unwinder: Unwinder | None) -> UserStacks:
    """The user stacks of SAMPLES in MEMORY; those with a copy of the stack by UNWINDER."""
    by_frames = by_frame_pointers(samples)
    copied = np.flatnonzero((samples.structs["flags"] & np.uint32(BY_FRAMES | NO_USER)) == 0)
    if unwinder is None or not len(copied):
        return by_frames
    registers = _registers(samples.structs["registers"][copied], unwinder.machine)
    stacks = unwinder.unwind(
        [process.maps for process in memory.processes],
        memory.of_sample[copied],
        samples.structs["time_ns"][copied],
        Copies(
            memory.of_sample[copied],
            registers,
            samples.words,
            samples.first_words[copied],
            samples.word_counts[copied],
            samples.structs["stack_start"][copied],
            ~(samples.has(STACK_CUT) | samples.has(STACK_HIDDEN))[copied],
        ),
    )
    ends, unwinding = by_frames.ends, by_frames.unwinding
    ends[copied], unwinding[copied] = stacks.ends, stacks.unwinding
    is_gone = np.array([not process.maps.generations for process in memory.processes], bool)
    ends[is_gone[memory.of_sample] & ~samples.has(NO_USER)] = pb.CPU_STACK_END_PROCESS_GONE
    lengths = by_frames.addresses.lengths
    lengths[copied] = stacks.lengths
    if len(copied) + np.count_nonzero(samples.has(NO_USER)) < len(samples):
        raise ValueError("samples with and without a copy of their stack")  # never of one session
    return UserStacks(
        Ragged(stacks.addresses, lengths),
        (stacks.flags & np.uint8(Frame.EXACT)) == 0,
        (stacks.flags & np.uint8(Frame.GUESS)) != 0,
        ends,
        unwinding,
    )


def _registers(of: NDArray[Any], machine: Machine) -> NDArray[np.uint64]:
    """Registers by their numbers in DWARF, (n, machine.registers), of struct user_registers."""
    if machine is X86_64:
        return np.stack([of[name] for name in _X86], axis=1)
    return np.concatenate([of["x"], of["sp"][:, np.newaxis], of["pc"][:, np.newaxis]], axis=1)


def by_frame_pointers(samples: Samples) -> UserStacks:
    """The stacks that the kernel has followed."""
    addresses = samples.user_frames
    followed = samples.has(BY_FRAMES)
    ends = np.full(len(samples), pb.CPU_STACK_END_FRAME_POINTERS, np.uint32)
    ends[samples.has(STACK_CUT) & followed] = pb.CPU_STACK_END_TOO_MANY_FRAMES
    ends[samples.has(NO_USER)] = pb.CPU_STACK_END_NO_USER_STACK
    unwinding = np.where(followed, np.uint32(pb.CPU_UNWINDING_FRAME_POINTERS), np.uint32(0))
    is_return = addresses.places > 0
    return UserStacks(addresses, is_return, is_return, ends, unwinding)
