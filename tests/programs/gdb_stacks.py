"""Runs inside gdb: stops a process again and again, and writes what each thread's registers, stack
and frames are, a line of JSON each. Each `continue` ends when the process is sent SIGWINCH."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gdb  # type: ignore[import-untyped]  # there inside of gdb alone

REGISTERS = (
    "rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15", "rip",
)  # fmt: skip
STACK_POINTER = 7
RED_ZONE_BYTES = 128
MASK = (1 << 64) - 1
SETTINGS = (
    "pagination off", "confirm off", "width 0",
    "backtrace past-main on", "backtrace past-entry on", "backtrace limit 0",
)  # fmt: skip


def frames() -> list[tuple[int, bool]]:
    """Of each real frame, innermost first: its address, and whether it is a signal handler's
    return."""
    found = []
    frame = gdb.newest_frame()
    while frame is not None and frame.is_valid():
        if frame.type() not in (gdb.INLINE_FRAME, gdb.TAILCALL_FRAME):
            found.append((frame.pc(), frame.type() == gdb.SIGTRAMP_FRAME))
        try:
            frame = frame.older()
        except gdb.error:
            break
    return found


def copy_of_stack(pid: int, sp: int, most: int) -> tuple[int, bytes]:
    base, content = (sp - RED_ZONE_BYTES) & ~7, b""
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        memory.seek(base)
        while len(content) < most:
            try:
                content += memory.read(
                    min(most - len(content), 4096 - (base + len(content)) % 4096)
                )
            except OSError:
                break
    return base, content[: len(content) & ~7]


def run(pid: int, rounds: int, output: Path, most_bytes: int) -> None:
    for setting in SETTINGS:
        gdb.execute(f"set {setting}")
    gdb.execute("handle SIGWINCH stop print nopass", to_string=True)
    gdb.execute("handle SIGUSR1 nostop pass noprint", to_string=True)
    with output.open("w") as file:
        for _ in range(rounds):
            gdb.execute("continue", to_string=True)
            for thread in gdb.selected_inferior().threads():
                thread.switch()
                frame = gdb.newest_frame()
                registers = [int(frame.read_register(name)) & MASK for name in REGISTERS]
                base, content = copy_of_stack(pid, registers[STACK_POINTER], most_bytes)
                file.write(json.dumps([registers, base, content.hex(), frames()]) + "\n")
    gdb.execute("detach", to_string=True)


run(
    int(os.environ["CORAL_STACKS_PID"]),
    int(os.environ["CORAL_STACKS_ROUNDS"]),
    Path(os.environ["CORAL_STACKS_OUTPUT"]),
    int(os.environ["CORAL_STACKS_BYTES"]),
)
