"""Runs inside gdb: stops a process again and again, and writes what each thread's registers, stack
and frames are, a line of JSON each. Set by -ex "python ...": `pid`, `rounds`, `output`."""

import json

import gdb  # type: ignore[import-not-found]  # only there inside of gdb

REGISTERS = "rax rdx rcx rbx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip".split()
MASK = (1 << 64) - 1


def frames():
    found = []
    frame = gdb.newest_frame()
    while frame is not None and frame.is_valid():
        if frame.type() not in (gdb.INLINE_FRAME, gdb.TAILCALL_FRAME):
            found.append((frame.pc(), frame.type() == gdb.SIGTRAMP_FRAME))
        try:
            frame = frame.older()
        except gdb.error:
            break
    reason = 0 if not found else gdb.newest_frame().unwind_stop_reason()
    return found, reason


def copy_of_stack(sp, most):
    base, content = (sp - 128) & ~7, b""
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:  # noqa: F821, PTH123
        memory.seek(base)
        while len(content) < most:
            try:
                part = memory.read(min(most - len(content), 4096 - (base + len(content)) % 4096))
            except OSError:
                break
            content += part
    return base, content[: len(content) & ~7]


def run(pid, rounds, output, most=65536):
    for setting in (
        "pagination off",
        "confirm off",
        "backtrace past-main on",
        "backtrace past-entry on",
        "backtrace limit 0",
        "width 0",
    ):
        gdb.execute(f"set {setting}")
    gdb.execute("handle SIGWINCH stop print nopass", to_string=True)
    gdb.execute("handle SIGUSR1 nostop pass noprint", to_string=True)
    with open(output, "w") as file:  # noqa: PTH123
        for _ in range(rounds):
            gdb.execute("continue", to_string=True)  # until somebody sends SIGWINCH
            for thread in gdb.selected_inferior().threads():
                thread.switch()
                frame = gdb.newest_frame()
                registers = [int(frame.read_register(name)) & MASK for name in REGISTERS]
                base, content = copy_of_stack(registers[7], most)
                found, reason = frames()
                line = [thread.ptid[1], registers, base, content.hex(), found, reason]
                file.write(json.dumps(line) + "\n")
    gdb.execute("detach", to_string=True)


run(pid, rounds, output)  # type: ignore[name-defined]  # noqa: F821  set by the command line
