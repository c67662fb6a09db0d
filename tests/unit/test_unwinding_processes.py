"""Samples of this very process: what it has mapped decides how they are unwound."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from coral.collectors.symbols.files import MappedFiles
from coral.collectors.symbols.maps import ProcessMaps
from coral.collectors.unwinding.rules import X86_64
from coral.collectors.unwinding.stacks import End, Frame, Samples, Stacks
from coral.collectors.unwinding.tables import Tables
from coral.collectors.unwinding.unwinder import Unwinder
from tests.support import wait_until

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="code of x86-64")
STACK = 0x7000_0000
TRAMPOLINE = bytes.fromhex("4883ec08ffd14883c408c3")
_ANY = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
NOW = np.iinfo(np.uint64).max


@pytest.fixture
def files() -> Iterator[MappedFiles]:
    files = MappedFiles()
    yield files
    files.close()


def code_of(name: str) -> int:
    """An address in the code of a library of this process."""
    found = re.search(rf"([0-9a-f]+)-\S+ r-xp .*{name}", Path("/proc/self/maps").read_text())
    assert found
    return int(found[1], 16) + 0x100


def sample(ip: int, *words: int) -> Samples:
    registers = np.zeros((1, X86_64.registers), np.uint64)
    registers[0, [X86_64.instruction_pointer, X86_64.stack_pointer]] = ip, STACK
    zero = np.zeros(1, np.int64)
    base = np.array([STACK], np.uint64)
    return Samples(zero, registers, np.array(words, np.uint64), zero, zero + len(words), base)


def unwound(unwinder: Unwinder, process: ProcessMaps, of: Samples, time_ns: int = NOW) -> Stacks:
    return unwinder.unwind([process], np.zeros(1, np.int64), np.array([time_ns], np.uint64), of)


def executable(content: bytes) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, _ANY)
    memory.write(content)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def test_a_file_is_compiled_when_a_stack_leads_there(files: MappedFiles) -> None:
    tables = Tables()
    unwinder, process = Unwinder(X86_64, tables), ProcessMaps(os.getpid(), files)
    assert len(process.files) > 5
    assert unwound(unwinder, process, sample(0x10)).ends.tolist() == [End.ERROR]
    assert tables.compiled == 0
    stacks = unwound(unwinder, process, sample(code_of("libc.so.6")))
    assert tables.compiled == 1
    assert stacks.lengths.tolist() == [1]
    assert stacks.unmapped.tolist() == [0]
    unwound(unwinder, process, sample(code_of("libc.so.6") + 64))
    assert tables.compiled == 1


def test_memory_that_was_mapped_since_is_found(files: MappedFiles) -> None:
    unwinder, process = Unwinder(X86_64), ProcessMaps(os.getpid(), files)
    memory, address = executable(b"\x90" * 64)
    # In this memory there are no tables; a frame pointer of 0 is the outermost one's. Maps are read
    # again at most 5 % of the time.
    ends = partial(unwound, unwinder, process, sample(address, 0, 0), time_ns=1)
    wait_until(lambda: ends().ends.tolist() == [End.BOTTOM])
    assert len(process.generations) == 2
    assert len(memory) == 4096


@pytest.mark.parametrize("before", [b"", bytes.fromhex("f30f1efa")])
def test_cpythons_trampolines_are_known_by_their_code(files: MappedFiles, before: bytes) -> None:
    memory, address = executable((before + TRAMPOLINE).ljust(32, b"\0") * 4)
    caller = code_of("libc.so.6")
    unwinder, process = Unwinder(X86_64), ProcessMaps(os.getpid(), files)
    stacks = unwound(unwinder, process, sample(address + 6, 7, caller, 0))
    assert stacks.stack(0) == [address + 6, caller]
    assert stacks.flags.tolist() == [Frame.EXACT, 0]
    assert len(memory) == 4096


def test_a_process_that_has_gone_has_frames_of_no_known_memory(files: MappedFiles) -> None:
    process = ProcessMaps(2**22 + 1, files)  # above the largest number of a process
    stacks = unwound(Unwinder(X86_64), process, sample(0x1234, 1, 2))
    assert stacks.stack(0) == [0x1234]
    assert stacks.ends.tolist() == [End.ERROR]
