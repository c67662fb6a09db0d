"""Stacks of addresses become stacks of frames, each once: by array, a call for each process."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from coral.collectors.columns import group
from coral.collectors.cpu_profile.processes import Process, Processes
from coral.collectors.cpu_profile.ragged import Ragged, joined_reversed
from coral.collectors.cpu_profile.samples import Samples
from coral.collectors.members import process_keys
from coral.collectors.symbols.strings import Strings
from coral.mesh.v1 import ebpf_pb2 as pb

# Which words of memory a process uses as addresses is its own choice: with factors of this run, it
# cannot choose two that are taken for one.
_FACTORS: Final = [np.uint64(secrets.randbits(64) | 1) for _ in range(8)]

FRAME: Final = np.dtype(
    [("function", "u4"), ("module", "u4"), ("build_id", "u4"), ("flags", "u4"), ("address", "u8")]
)
"""A frame: numbers of strings, pb.CpuFrameFlag, and the address in its module."""


class UserStacks(NamedTuple):
    """The user stacks of n samples: `addresses`, innermost first; of each address, of shape (m,),
    whether it is one to return to, and whether it was guessed; of each sample, of shape (n,), its
    pb.CpuStackEnd and pb.CpuUnwinding."""

    addresses: Ragged
    is_return: NDArray[np.bool_]
    is_guess: NDArray[np.bool_]
    ends: NDArray[np.uint32]
    unwinding: NDArray[np.uint32]


class Places(NamedTuple):
    """Places in the code of one process: addresses, of shape (k,), whether each is one to return
    to, and when it was seen, on CLOCK_MONOTONIC."""

    addresses: NDArray[np.uint64]
    is_return: NDArray[np.bool_]
    times_ns: NDArray[np.uint64]


class Namer(Protocol):
    """Knows what lies at addresses. Strings are numbers into `strings`, which only grows."""

    @property
    def strings(self) -> Strings:
        """What the numbers stand for."""

    def of_process(self, process: Process, places: Places) -> NDArray[Any]:
        """Frames, of shape (k,) and of the type `FRAME`, of PLACES in the memory of PROCESS."""

    def of_kernel(self, places: Places) -> NDArray[Any]:
        """The same of the kernel's."""


class Memory(NamedTuple):
    """Whose memory samples were taken in: the number of each, of shape (n,), in `processes`."""

    of_sample: NDArray[np.intp]
    processes: Sequence[Process]


class Frames(NamedTuple):
    """`table` has each frame once; `stacks` has a stack for each sample, outermost frame first, in
    numbers of `table`."""

    stacks: Ragged
    table: NDArray[Any]


def mixed(*columns: NDArray[Any]) -> NDArray[np.uint64]:
    """A number for each row of COLUMNS, integers of shape (n,): the same for equal rows, and surely
    enough another for others."""
    key = np.zeros(len(columns[0]), np.uint64)
    for number, column in enumerate(columns):
        key = (key ^ column.astype(np.uint64)) * _FACTORS[number % len(_FACTORS)]
        key ^= key >> np.uint64(29)
    return key


def memory_of(samples: Samples, processes: Processes) -> Memory:
    """The memory of SAMPLES, as PROCESSES knows it."""
    structs = samples.structs
    first, of_sample = group(mixed(structs["tgid"], structs["born"], structs["execs"]))
    some = structs[first]
    order = np.lexsort((some["execs"], some["born"], some["tgid"]))
    process = process_keys(some["tgid"], some["born"])[order]
    newest = np.append(process[1:] != process[:-1], True)[: len(process)]
    found = {
        at: processes.of(some[at], newest=is_newest)
        for at, is_newest in zip(order.tolist(), newest.tolist(), strict=True)
    }
    return Memory(of_sample, [found[at] for at in range(len(order))])


def resolve(samples: Samples, user: UserStacks, memory: Memory, namer: Namer) -> Frames:
    """The frames of SAMPLES in MEMORY, whose user stacks are USER, as NAMER names them."""
    kernel = samples.kernel_frames
    of_process = memory.of_sample
    owner = user.addresses.owner
    keys = mixed(user.addresses.flat, user.is_return, user.is_guess, of_process[owner])
    first, of_user = group(keys)
    found = np.zeros(len(first), FRAME)
    at = owner[first]
    for number, process in enumerate(memory.processes):
        mine = np.flatnonzero(of_process[at] == number)
        chosen = first[mine]
        places = Places(
            user.addresses.flat[chosen],
            user.is_return[chosen],
            samples.structs["time_ns"][owner[chosen]],
        )
        if len(mine):
            found[mine] = namer.of_process(process, places)
    found["flags"] |= np.where(user.is_guess[first], np.uint32(pb.CPU_FRAME_FLAG_GUESS), 0)
    kernel_found, of_kernel = _kernel(samples, kernel, namer)
    both = np.concatenate([found, kernel_found])
    of_frame, of_place = group(_identities(both))
    stacks = joined_reversed(
        Ragged(of_place[of_user], user.addresses.lengths),
        Ragged(of_place[len(found) + of_kernel], kernel.lengths),
    )
    return Frames(stacks, both[of_frame])


def _identities(frames: NDArray[Any]) -> NDArray[np.uint64]:
    """The same number for places of one function, and for the same place without a name."""
    has_name = frames["flags"] & np.uint32(pb.CPU_FRAME_FLAG_UNNAMED) == 0
    address = np.where(has_name, np.uint64(0), frames["address"])
    return mixed(address, *(frames[it] for it in ("function", "module", "build_id", "flags")))


def _kernel(
    samples: Samples, kernel: Ragged, namer: Namer
) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The frames of distinct places in the kernel, and the place of each address."""
    is_return = kernel.places > 0
    first, of_address = group(mixed(kernel.flat, is_return))
    if not len(first):
        return np.zeros(0, FRAME), of_address
    owner = kernel.owner
    times_ns = samples.structs["time_ns"][owner[first]]
    return namer.of_kernel(Places(kernel.flat[first], is_return[first], times_ns)), of_address
