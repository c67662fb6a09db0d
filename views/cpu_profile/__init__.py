"""What a person sees of `cpu_profile`."""

from __future__ import annotations

from typing import Final

from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.contract import INTERVAL, Flag, View
from coral.views.cpu_profile.files import FILES
from coral.views.cpu_profile.provoke import PROVOCATION
from coral.views.cpu_profile.story import ProfileStory

VIEW: Final = View(
    kind=pb.EBPF_COLLECTOR_KIND_CPU_PROFILE,
    about="Where CPU time goes, by function and stack.",
    story=lambda _: ProfileStory(),
    flags=(
        INTERVAL,
        Flag(
            "--frequency",
            "Samples a second of CPU time, from 1 to 999.  [default: 99]",
            key="frequency",
            metavar="HERTZ",
            short="-F",
        ),
        Flag(
            "--stack-bytes",
            "How much of a user stack is copied at most, 0 for none.  [default: 28KiB]",
            key="stack_bytes",
            metavar="BYTES",
        ),
    ),
    cheaper="sample less often with --frequency",
    provocation=PROVOCATION,
    columns=True,
    files=FILES,
)
