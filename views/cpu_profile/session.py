"""What a file says of the session that it was made from."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from coral.views.cpu_profile.profile import Profile
from coral.views.text import format_ns, format_share

NOTHING_RAN: Final = "nothing ran: no sample was taken, so the target used next to no CPU time"


@dataclass(frozen=True)
class Facts:
    """A session: what it watched, when by the agent's clock, how it ended, in words, and what was
    lost on the way to this client, in rows, by stage."""

    target: str
    began_ns: int = 0
    seconds: float = 0.0
    end: str = ""
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
    yield from missing(profile)
    for stage, count in facts.lost_rows.items():
        yield f"{count:,} rows, of one sample or more each, lost on the way ({stage})"


def amount_words(profile: Profile, seconds: float) -> str:
    """`2,970 samples, 30.0s of CPU time (0.99 CPUs), 12% in the kernel`."""
    text = f"{profile.samples:,} samples, {format_ns(profile.cpu_ns)} of CPU time"
    if seconds > 0:
        text += f" ({profile.cpu_ns / 1e9 / seconds:.2f} CPUs)"
    return f"{text}, {format_share(profile.in_kernel / profile.samples)} in the kernel"


def missing(profile: Profile) -> Iterator[str]:
    """What was not seen, or not seen for sure."""
    samples = profile.samples
    if profile.lost:
        yield f"{profile.lost:,} samples lost in the kernel"
    if cut := profile.cut:
        yield (
            f"{cut:,} samples ({format_share(cut / samples)}) have stacks whose callers are "
            f"missing, drawn under [cut]: {profile.cut_words}"
        )
    if unknown := profile.unknown_ends:
        yield (
            f"{unknown:,} samples ({format_share(unknown / samples)}) have stacks that end where "
            "the frame pointers do, which may be above the first function"
        )
    if profile.guessed:
        yield (
            f"{profile.guessed:,} samples ({format_share(profile.guessed / samples)}) have frames "
            "that were guessed, marked ~"
        )
    if profile.truncated:
        yield f"{profile.truncated:,} samples had more stack than was copied"
    if profile.not_kept:
        yield (
            f"{profile.not_kept:,} samples are without their stacks, which were too many different "
            "ones to keep"
        )
