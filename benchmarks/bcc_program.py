"""bcc at the same job as `syscall_stats`, for one process: calls, errors, total, log2 histogram.

Run with Debian's own Python, which has bcc, and a process id: prints one JSON line once it has seen
a call, then stays until its standard input ends. It belongs to no environment of ours.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Final

PROGRAM: Final = """
struct stats {
    u64 calls, errors, total_ns, slots[32];
};
BPF_HASH(start_ns, u32, u64);
BPF_PERCPU_HASH(stats, u32, struct stats);

TRACEPOINT_PROBE(raw_syscalls, sys_enter) {
    u64 id = bpf_get_current_pid_tgid(), now = bpf_ktime_get_ns();
    u32 tid = id;
    if (id >> 32 == TARGET)
        start_ns.update(&tid, &now);
    return 0;
}

TRACEPOINT_PROBE(raw_syscalls, sys_exit) {
    u32 tid = bpf_get_current_pid_tgid(), nr = args->id;
    u64 *start = start_ns.lookup(&tid);
    if (!start)
        return 0;
    struct stats zero = {}, *s = stats.lookup_or_try_init(&nr, &zero);
    if (!s)
        return 0;
    u64 ns = bpf_ktime_get_ns() - *start;
    s->calls++;
    s->errors += args->ret < 0;
    s->total_ns += ns;
    s->slots[bpf_log2l(ns) & 31]++;
    return 0;
}
"""


def main() -> None:
    """Loads, attaches, waits for the first figure, tells the times."""
    from bcc import BPF  # noqa: PLC0415  this module can be imported where there is no bcc

    began_at = time.monotonic()
    program = BPF(text=PROGRAM.replace("TARGET", str(int(sys.argv[1]))))
    attached_at = time.monotonic()
    while not len(program["stats"]):
        time.sleep(0.001)
    print(json.dumps({"attached_after_s": attached_at - began_at}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
