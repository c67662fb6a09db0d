"""What a row of a session that watches pods or containers is of, both for the agent that sends it
and for those that read it."""

from __future__ import annotations

from collections.abc import Mapping


def of_resource(common: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """All attributes of one of a batch's resources: the COMMON ones of the batch, and its OWN. An
    own one that is empty says that the resource has none of that name."""
    return {name: text for name, text in {**common, **own}.items() if text}
