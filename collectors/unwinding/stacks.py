"""What goes into unwinding, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

import numpy as np
from numpy.typing import NDArray


class Frame(IntFlag):
    """What is to be known of one frame."""

    EXACT = 1  # the address is the instruction itself, and not the one after a call
    SIGNAL = 2  # the kernel called a signal handler here
    GUESS = 4  # found by frame pointers, or alike, where no table says what is right


class End(IntEnum):
    """Why a stack has no more frames; numbered as in CpuStackEnd of the contract."""

    BOTTOM = 1
    NO_UNWIND_INFO = 2
    COPY_TOO_SHORT = 3
    ERROR = 4
    TOO_MANY_FRAMES = 5
    FRAME_POINTERS = 7  # the chain of frame pointers ended, at the bottom or not


class Unwinding(IntEnum):
    """How a stack's frames were found; numbered as in CpuUnwinding of the contract."""

    FRAME_POINTERS = 1
    EH_FRAME = 2


@dataclass(frozen=True, slots=True)
class Samples:
    """N interrupted threads: registers, and the top of each stack."""

    memory: NDArray[np.int64]  # (n,): whose memory, by its slot in the `Space`
    registers: NDArray[np.uint64]  # (n, machine.registers)
    words: NDArray[np.uint64]  # (w,): the copies of all stacks, each from its lowest address on
    first: NDArray[np.int64]  # (n,): index in `words` of a stack's first word
    count: NDArray[np.int64]  # (n,): words copied
    base: NDArray[np.uint64]  # (n,): the address of a stack's first word, a multiple of 8
    # (n,): whether the copy has all of the stack: nothing above it is a part of that. By default,
    # none has.
    is_whole: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.memory)

    def take(self, index: NDArray[np.int64]) -> Samples:
        """The samples at INDEX, (k,). `words` is shared."""
        return Samples(
            self.memory[index],
            self.registers[index],
            self.words,
            self.first[index],
            self.count[index],
            self.base[index],
            None if self.is_whole is None else self.is_whole[index],
        )


@dataclass(frozen=True, slots=True)
class Stacks:
    """N stacks, each innermost frame first, one after the other."""

    addresses: NDArray[np.uint64]  # (f,): instructions, or return addresses
    flags: NDArray[np.uint8]  # (f,): Frame
    lengths: NDArray[np.int64]  # (n,): frames of each
    ends: NDArray[np.uint8]  # (n,): End
    unwinding: NDArray[np.uint8]  # (n,): Unwinding
    # (n,): the address in a caller at which a stack ended because nothing is known of what is
    # mapped there; else 0.
    unmapped: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """(n + 1,): where each stack begins in `addresses`, and the end of the last."""
        return np.append(0, np.cumsum(self.lengths))

    def take(self, index: NDArray[np.int64]) -> Stacks:
        """The stacks at INDEX, (k,)."""
        lengths = self.lengths[index]
        first = np.repeat(self.offsets[index], lengths)
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return Stacks(
            self.addresses[first + within],
            self.flags[first + within],
            lengths,
            self.ends[index],
            self.unwinding[index],
            self.unmapped[index],
        )

    def stack(self, index: int) -> list[int]:
        """The addresses of one stack, innermost first."""
        begin = int(self.lengths[:index].sum())
        found: list[int] = self.addresses[begin : begin + int(self.lengths[index])].tolist()
        return found


def replaced(stacks: Stacks, index: NDArray[np.int64], by: Stacks) -> Stacks:
    """STACKS in which those at INDEX, (k,), are BY, k stacks."""
    source = np.arange(len(stacks))
    source[index] = len(stacks) + np.arange(len(index))
    both = Stacks(
        np.concatenate([stacks.addresses, by.addresses]),
        np.concatenate([stacks.flags, by.flags]),
        np.concatenate([stacks.lengths, by.lengths]),
        np.concatenate([stacks.ends, by.ends]),
        np.concatenate([stacks.unwinding, by.unwinding]),
        np.concatenate([stacks.unmapped, by.unmapped]),
    )
    return both.take(source)


def from_frame_pointers(
    addresses: NDArray[np.uint64], lengths: NDArray[np.int64], most_frames: int
) -> Stacks:
    """The stacks that the kernel found by frame pointers (`bpf_get_stack` with BPF_F_USER_STACK):
    ADDRESSES, (f,), innermost first, LENGTHS, (n,), of each, cut after MOST_FRAMES. How they are
    found is a guess where code has no frame pointers; so only the first frame is sure."""
    begins = np.cumsum(lengths) - lengths
    flags = np.full(len(addresses), Frame.GUESS, np.uint8)
    flags[begins[lengths > 0]] = Frame.EXACT
    ends = np.where(lengths >= most_frames, End.TOO_MANY_FRAMES, End.FRAME_POINTERS)
    return Stacks(
        addresses,
        flags,
        lengths.astype(np.int64),
        ends.astype(np.uint8),
        np.full(len(lengths), Unwinding.FRAME_POINTERS, np.uint8),
        np.zeros(len(lengths), np.uint64),
    )
