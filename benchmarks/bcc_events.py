"""bcc at the same job as `mode=events`: a record of 48 bytes for each getppid of one process.

    /usr/bin/python3 bcc_events.py PID perf|ring SYSCALL_NUMBER BUFFER_BYTES

Run with Debian's own Python, which has bcc. Prints `attached`; polls until a line comes on its
standard input and there is nothing left; then prints one JSON line. The callback does the least
that there is to do, it counts. It belongs to no environment of ours.
"""

from __future__ import annotations

import json
import mmap
import select
import sys
import time
from typing import Any, Final

PROGRAM: Final = """
struct call {
    u64 ended_ns, duration_ns;
    s64 return_value;
    u32 pid, tid, syscall_number, reserved[3];
};
BPF_HASH(start_ns, u32, u64);
BPF_PERCPU_ARRAY(produced, u64, 1);
OUTPUT;

RAW_TRACEPOINT_PROBE(sys_enter) {
    u64 id = bpf_get_current_pid_tgid(), now;
    u32 tid = id;
    if (id >> 32 != TARGET || ctx->args[1] != NUMBER)
        return 0;
    now = bpf_ktime_get_ns();
    start_ns.update(&tid, &now);
    return 0;
}

RAW_TRACEPOINT_PROBE(sys_exit) {
    u64 id = bpf_get_current_pid_tgid(), *start;
    u32 tid = id;
    if (id >> 32 != TARGET || !(start = start_ns.lookup(&tid)))
        return 0;
    struct call call = {};
    call.ended_ns = bpf_ktime_get_ns();
    call.duration_ns = call.ended_ns - *start;
    call.return_value = ctx->args[1];
    call.pid = id >> 32;
    call.tid = tid;
    call.syscall_number = NUMBER;
    start_ns.delete(&tid);
    produced.increment(0);
    SUBMIT;
    return 0;
}
"""


def main() -> None:
    """Loads, attaches, counts, tells."""
    from bcc import BPF  # noqa: PLC0415  this module can be imported where there is no bcc

    pid, way, number, pages = sys.argv[1], sys.argv[2], sys.argv[3], _pages(int(sys.argv[4]))
    perf = way == "perf"
    text = PROGRAM.replace("TARGET", pid).replace("NUMBER", number)
    if perf:
        output, submit = "BPF_PERF_OUTPUT(events)", "events.perf_submit(ctx, &call, sizeof(call))"
    else:
        output = f"BPF_RINGBUF_OUTPUT(events, {pages})"
        submit = "events.ringbuf_output(&call, sizeof(call), 0)"
    text = text.replace("OUTPUT;", f"{output};").replace("SUBMIT", submit)
    program: Any = BPF(text=text)
    received = told_lost = 0

    def on_event(_context: object, _data: object, _size: int) -> None:
        nonlocal received
        received += 1

    def on_lost(count: int) -> None:
        nonlocal told_lost
        told_lost += count

    if perf:
        program["events"].open_perf_buffer(on_event, page_cnt=pages, lost_cb=on_lost)
        poll = program.perf_buffer_poll
    else:
        program["events"].open_ring_buffer(on_event)
        poll = program.ring_buffer_poll
    print("attached", flush=True)
    began_s, finished, before = time.thread_time(), False, -1
    while not finished or received != before:
        before = received
        poll(20)
        finished = finished or bool(select.select([sys.stdin], [], [], 0)[0])
    told = {
        "cpu_s": time.thread_time() - began_s,
        "received": received,
        "told_lost": told_lost,
        "produced": program["produced"].sum(0).value,
    }
    print(json.dumps(told), flush=True)


def _pages(buffer_bytes: int) -> int:
    return buffer_bytes // mmap.PAGESIZE


if __name__ == "__main__":
    main()
