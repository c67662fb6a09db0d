"""The JSON that speedscope opens: https://www.speedscope.app/file-format-schema.json.

The first profile has all samples; where there are several threads, each has a profile of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from coral.views.cpu_profile.names import visible
from coral.views.cpu_profile.profile import Frame, Profile
from coral.views.cpu_profile.session import Facts
from coral.views.cpu_profile.tree import roots

_SCHEMA: Final = "https://www.speedscope.app/file-format-schema.json"
_MOST_THREADS: Final = 64
_GUESS: Final = "~ "  # before the name of a frame that was guessed

_Samples = list[tuple[list[int], int]]


class _Frames:
    """The table of frames, which stacks point into."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []
        self._numbers: dict[tuple[str, str], int] = {}

    def number(self, name: str, file: str = "") -> int:
        """The number of a frame."""
        key = visible(name), visible(file)
        if key not in self._numbers:
            self._numbers[key] = len(self.rows)
            self.rows.append({"name": key[0]} | ({"file": key[1]} if file else {}))
        return self._numbers[key]


def speedscope(profile: Profile, facts: Facts) -> str:
    """PROFILE as JSON; weights are nanoseconds of CPU time, or cycles."""
    frames = _Frames()
    everything: _Samples = []
    threads: dict[tuple[str, int], _Samples] = {}
    marks_of = roots(profile)
    for origin, stack, count in profile.stacks():
        numbers = [frames.number(name) for name in marks_of(origin)]
        numbers += [frames.number(_name(frame), frame.module) for frame in stack]
        everything.append((numbers, count))
        threads.setdefault((origin.thread, origin.tid), []).append((numbers, count))
    # The schema asks for at least one profile, and every sample for at least one frame.
    # Without a unit of its own, it shows plain numbers.
    unit = "none" if profile.in_cycles else "nanoseconds"
    profiles = [_profile("all threads", everything, profile.period, unit)]
    if len(threads) > 1:
        busiest = sorted(threads.items(), key=lambda it: -sum(count for _, count in it[1]))
        for (thread, tid), samples in busiest[:_MOST_THREADS]:
            profiles.append(_profile(f"{visible(thread)}/{tid}", samples, profile.period, unit))
    return json.dumps(
        {
            "$schema": _SCHEMA,
            "exporter": "coral",
            "name": visible(facts.target),
            "activeProfileIndex": 0,
            "shared": {"frames": frames.rows},
            "profiles": profiles,
        }
    )


def _name(frame: Frame) -> str:
    return f"{_GUESS if frame.guessed else ''}{frame.function}"


def _profile(
    name: str, samples: Iterable[tuple[list[int], int]], period: int, unit: str
) -> dict[str, Any]:
    """Samples one after the other. Equal neighbours are drawn as one, so the stacks are sorted:
    what has the same callers lies side by side."""
    ordered = sorted(samples)
    weights = [count * period for _, count in ordered]
    return {
        "type": "sampled",
        "name": name,
        "unit": unit,
        "startValue": 0,
        "endValue": sum(weights),
        "samples": [numbers for numbers, _ in ordered],
        "weights": weights,
    }
