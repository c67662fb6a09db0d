"""What a file says of the session that it was made from."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.cpu_profile.profile import Profile
from coral.views.text import format_amount, format_ns, format_share

NOTHING_RAN: Final = "nothing ran: no sample was taken, so the target used next to no CPU time"

_METHODS: Final[Mapping[int, str]] = {
    pb.CPU_UNWINDING_FRAME_POINTERS: "frame pointers",
    pb.CPU_UNWINDING_EH_FRAME: ".eh_frame",
}


@dataclass(frozen=True)
class Facts:
    """A session: what it watched, when by the agent's clock, how it ended, in words, how many
    samples were lost in the kernel, and how many rows on the way to this client, by stage."""

    target: str
    began_ns: int = 0
    seconds: float = 0.0
    end: str = ""
    lost_samples: int = 0
    lost_rows: Mapping[str, int] = field(default_factory=dict)


def told(profile: Profile, facts: Facts) -> Iterator[str]:
    """Sentences about a profile and all that is missing in it."""
    if not profile:
        yield NOTHING_RAN
    else:
        yield amount_words(profile, facts.seconds)
    if facts.began_ns:
        began = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(facts.began_ns / 1e9))
        yield f"began {began}, lasted {facts.seconds:.1f} s"
    if facts.end:
        yield f"ended: {facts.end}"
    yield from lost_words(facts.lost_samples)
    yield from missing(profile)
    yield from method_words(profile)
    for stage, count in facts.lost_rows.items():
        yield f"{_many(count, 'row')} of samples lost on the way ({stage})"


def amount_words(profile: Profile, seconds: float) -> str:
    """`2,970 samples, 30.0s of CPU time (0.99 CPUs), 12% in the kernel`. Cycles are not converted
    to time: how fast the CPUs' clocks were is not known."""
    text = _many(profile.samples)
    if profile.cycles:
        text += f", {format_amount(profile.cycles)} cycles"
    if profile.cpu_ns or not profile.cycles:
        text += f", {format_ns(profile.cpu_ns)} of CPU time"
        if seconds > 0:
            text += f" ({profile.cpu_ns / 1e9 / seconds:.2f} CPUs)"
    return f"{text}, {format_share(profile.in_kernel / profile.samples)} in the kernel"


def lost_words(samples: int) -> Iterator[str]:
    """`4 samples lost in the kernel`, or nothing."""
    if samples:
        yield f"{_many(samples)} lost in the kernel"


def method_words(profile: Profile) -> Iterator[str]:
    """`user stacks found by .eh_frame 93%, frame pointers 7%`: the shares of samples, or nothing
    where no sample says how its stack was found."""
    found = sum(profile.methods.values())
    if found:
        shares = (
            f"{_METHODS.get(method, str(method))} {format_share(count / found)}"
            for method, count in profile.methods.most_common()
        )
        yield f"user stacks found by {', '.join(shares)}"


def missing(profile: Profile) -> Iterator[str]:
    """What was not seen, or not seen for sure."""
    samples = profile.samples
    if cut := profile.cut:
        yield (
            f"{_part(cut, samples)} without the outermost callers, shown under [cut]: "
            f"{profile.cut_words}"
        )
    if unknown := profile.unknown_ends:
        yield (
            f"{_part(unknown, samples)} with stacks that end where the frame pointers do, which "
            "may be short of the outermost caller"
        )
    if profile.guessed:
        yield f"{_part(profile.guessed, samples)} with frames that were guessed, marked ~"
    if profile.truncated:
        yield f"{_many(profile.truncated)} had more stack than was copied"
    if profile.not_kept:
        yield (
            f"{_many(profile.not_kept)} without their stacks, [not kept]: there were too many "
            "different ones"
        )


def _many(count: int, what: str = "sample") -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _part(count: int, samples: int) -> str:
    return f"{_many(count)} ({format_share(count / samples)})"
