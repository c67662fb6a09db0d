"""Which containers of which pods the rows of a batch are of, in a word and as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any, Final

from coral.client import Batch
from coral.views.sheet import Column

COLUMN: Final = Column("POD", right=False, fits=True, room=12, comfort=24)
"""That of `row_pods`, in a table of a session that watches several."""
_PARTS: Final = ("k8s.pod.name", "k8s.container.name")


def pod_words(batch: Batch) -> list[str]:
    """`POD/CONTAINER` of each of the batch's resources, without what all of the session has in
    common; empty where nothing more is known."""
    common, *resources = batch.resources
    words = [""]
    for told in resources:
        parts = [told[name] for name in _PARTS if told.get(name, "") not in ("", common.get(name))]
        words.append("/".join(parts))
    return words


def row_pods(batch: Batch) -> Iterable[str]:
    """The same of each row; without end where none is of a resource."""
    if len(batch.resources) == 1:
        return repeat("")
    words = pod_words(batch)
    return [words[at] for at in batch.row_resources.tolist()]


def attributed(batch: Batch, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """RECORDS, one for each row, with the attributes of its container where the session watches
    pods."""
    if not batch.attributes and len(batch.resources) == 1:
        yield from records
        return
    for record, at in zip(records, batch.row_resources.tolist(), strict=True):
        yield record | {"attributes": dict(batch.resources[at])}


def with_pods(batch: Batch, lines: Iterable[str]) -> Iterator[str]:
    """LINES, one for each row, each with its pod at its end where rows are of several."""
    if not any(pod_words(batch)):
        yield from lines
        return
    for line, pod in zip(lines, row_pods(batch), strict=False):
        yield f"{line}  {pod}"


def lines_width(batch: Batch, width: int | None) -> int | None:
    """What `with_pods` leaves of a terminal's WIDTH for the lines."""
    longest = max(map(len, pod_words(batch)))
    return width - longest - 2 if width and longest else width
