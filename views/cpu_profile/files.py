"""The files that a session of `cpu_profile` can be written to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from coral.views.contract import FileFormat, Session, Story
from coral.views.cpu_profile.folded import folded
from coral.views.cpu_profile.html import page
from coral.views.cpu_profile.pprof import pprof
from coral.views.cpu_profile.profile import Profile
from coral.views.cpu_profile.session import Facts
from coral.views.cpu_profile.speedscope import speedscope
from coral.views.cpu_profile.story import ProfileStory
from coral.views.cpu_profile.svg import picture

# The stages at which a stream loses rows, by StreamAccount in the contract; at others the kernel
# loses samples.
_OF_ROWS: Final = frozenset({"rate_limit", "subscriber_queue", "replay_evicted"})


Render = Callable[[Profile, Facts], str | bytes]

RENDERERS: Final[Mapping[str, Render]] = {
    ".html": page,
    ".svg": picture,
    ".folded": lambda profile, _: folded(profile),
    ".pb.gz": pprof,
    ".speedscope.json": speedscope,
}
"""What makes each file, by its suffix."""


def _of_story(render: Render) -> Callable[[Story, Session], bytes]:
    """RENDER, for the story of a session."""

    def content(story: Story, session: Session) -> bytes:
        if not isinstance(story, ProfileStory):
            raise TypeError(f"{type(story).__name__} has no profile")
        watched = story.intervals
        rows = {stage: count for stage, count in session.lost.items() if stage in _OF_ROWS}
        in_kernel = sum(session.lost.values()) - sum(rows.values())
        facts = Facts(
            target=session.target,
            began_ns=watched.reached_ns - round(watched.seconds * 1e9),
            seconds=watched.seconds,
            end=session.end,
            # What the batches tell of themselves is short where one of them is lost.
            lost_samples=max(story.profile.lost, in_kernel),
            lost_rows=rows,
        )
        rendered = render(story.profile, facts)
        return rendered.encode() if isinstance(rendered, str) else rendered

    return content


_ABOUT: Final = {
    ".html": "a flame graph to search and zoom",
    ".svg": "a flame graph as a picture",
    ".folded": "a line for each stack",
    ".pb.gz": "for pprof",
    ".speedscope.json": "for speedscope",
}
FILES: Final = tuple(
    FileFormat(suffix, _ABOUT[suffix], _of_story(render)) for suffix, render in RENDERERS.items()
)
