"""Where the stack of a coroutine of makecontext(3) ends.

The function that a context begins with returns to code of libc that continues with the next
context (`__start_context`). Nothing has called that code, but until glibc says so itself, its
unwind table is that of any function: what lies above on the stack would be taken for a caller.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from coral.bpf.attaching.elf import PF_X, read_exactly
from coral.collectors.symbols.elf import EM_X86_64, ElfFile
from coral.collectors.unwinding.rules import (
    CFA,
    CFA_OFFSET,
    FIRST_REGISTER,
    X86_64,
    Cfa,
    Rows,
    Saved,
    cfa,
    no_rule,
    saved,
)

_MAKES_CONTEXTS: Final = b"\0makecontext\0"
_LARGEST_CODE_BYTES: Final = 4 << 20  # libc's has 1.4 MB
# mov %rbx, %rsp; mov (%rsp), %rdi; test %rdi, %rdi (__start_context.S for x86_64).
_START_CONTEXT: Final = bytes.fromhex("4889dc488b3c244885ff")
_BYTES: Final = 26
_ALIGNMENT: Final = 16


def context_start(elf: ElfFile) -> int | None:
    """The virtual address of `__start_context` in ELF, a libc; None for other files. Raises
    `ElfError` and OSError."""
    if elf.machine != EM_X86_64:
        return None
    if _MAKES_CONTEXTS not in (elf.section(".dynstr") or b""):
        return None
    for load in elf.loads[elf.loads["flags"] & PF_X != 0]:
        if load["bytes"] > _LARGEST_CODE_BYTES:
            continue
        code = read_exactly(elf.fd, load["offset"], load["bytes"])
        at = code.find(_START_CONTEXT)
        while at >= 0:
            address = int(load["address"]) + at
            if address % _ALIGNMENT == 0:
                return address
            at = code.find(_START_CONTEXT, at + 1)
    return None


def ending_at(rows: Rows, start: int) -> Rows:
    """ROWS, in which `__start_context` at the virtual address START is the outermost function, of
    the byte before it on: that is where a call that returns to it would have been."""
    first, after = np.uint64(start - 1), np.uint64(start + _BYTES)
    outermost = no_rule(X86_64)
    outermost[CFA], outermost[CFA_OFFSET] = cfa(Cfa.REGISTER, X86_64.stack_pointer), 8
    outermost[FIRST_REGISTER + len(X86_64.tracked) - 1] = saved(Saved.UNDEFINED)
    goes_on = rows.rule[np.searchsorted(rows.start, after, "right") - 1]
    before = np.searchsorted(rows.start, first)
    behind = np.searchsorted(rows.start, after, "right")
    number = np.array([len(rows.rules), goes_on], rows.rule.dtype)
    if number[0] != len(rows.rules):
        return rows  # no room for one more rule in such indexes
    edges = np.array([first, after], np.uint64)
    return replace(
        rows,
        start=np.concatenate([rows.start[:before], edges, rows.start[behind:]]),
        rule=np.concatenate([rows.rule[:before], number, rows.rule[behind:]]),
        rules=np.concatenate([rows.rules, outermost[np.newaxis]]),
    )
