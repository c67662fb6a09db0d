"""What a person sees of `syscall_stats`."""

from __future__ import annotations

from typing import Final

from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.contract import EVENTS, INTERVAL, Flag, Provocation, View
from coral.views.syscall_stats.story import SyscallStory

_CALLS: Final = 1000


def _calls(batch: Batch) -> int:
    return sum(row.call_count for row in batch.message.syscall_stats) + len(batch.events)


VIEW: Final = View(
    kind=pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS,
    about="System calls: counts, errors, latency.",
    story=lambda _: SyscallStory(),
    flags=(
        EVENTS,
        INTERVAL,
        Flag(
            "--include",
            "Count only these system calls, comma-separated.",
            key="include",
            metavar="NAMES",
        ),
        Flag("--exclude", "Count all but these system calls.", key="exclude", metavar="NAMES"),
    ),
    cheaper="name the system calls that matter with --include",
    provocation=Provocation(
        things="calls of getppid",
        times=_CALLS,
        code=f"for _ in range({_CALLS}): os.getppid()",
        count=_calls,
        config={"include": "getppid", "interval": "100ms"},
    ),
)
