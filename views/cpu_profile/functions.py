"""How much time each function used itself, and how much with all that it called."""

from __future__ import annotations

from dataclasses import dataclass

from coral.views.cpu_profile.profile import Function, Profile


@dataclass(slots=True)
class Use:
    """The samples of one function: `own` where it ran itself, `total` where it is on the stack,
    counted once a sample however often it is there; `guessed` of these where its frame was a
    guess."""

    function: Function
    own: int = 0
    total: int = 0
    guessed: int = 0


def uses(profile: Profile) -> list[Use]:
    """Every function of PROFILE, those that used most themselves first; the frames of a module that
    have no names are one. The sum of `own` is the number of samples."""
    found: dict[Function, Use] = {}
    for _, frames, count in profile.stacks():
        for function in {frame.group for frame in frames}:
            if function not in found:
                found[function] = Use(function)
            found[function].total += count
        for function in {frame.group for frame in frames if frame.guessed}:
            found[function].guessed += count
        found[frames[-1].group].own += count
    return sorted(found.values(), key=lambda it: (-it.own, -it.total, it.function))
