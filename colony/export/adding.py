"""Rows of rollups added up by service and subject: a few groups, whatever the number of agents."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from coral.wire.series import Service, le

PLACE: Final = ("service", "namespace", "workload", "container")

_SLOT: Final = re.compile(r"(?:e(\d+)|le_(\d+|inf))")
_K8S: Final = {"namespace": "k8s.namespace.name", "container": "k8s.container.name"}


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one service with the same KEYS: their figures by column, added up."""

    service: str
    keys: tuple[Any, ...]
    figures: Mapping[str, int]


def groups(rows: pa.Table, keys: Sequence[str]) -> Iterator[Group]:
    """ROWS by service and KEYS. All columns of 64 bits that are not keys are added up; NULL is 0,
    or nothing."""
    names = [*PLACE, *keys]
    figures = [
        it.name
        for it in rows.schema
        if pa.types.is_int64(it.type) and it.name not in (*names, "time_ns", "interval_ns")
    ]
    plain = pa.table(
        {name: _plain(rows, name) for name in names} | {name: rows[name] for name in figures}
    )
    added = plain.group_by(names).aggregate([(name, "sum") for name in figures])
    columns = [added[name].to_pylist() for name in (*names, *(f"{it}_sum" for it in figures))]
    for values in zip(*columns, strict=True):
        place, own = values[: len(PLACE)], values[len(PLACE) : len(names)]
        sums = (value or 0 for value in values[len(names) :])
        yield Group(_service(*place), own, dict(zip(figures, sums, strict=True)))


def _plain(rows: pa.Table, name: str) -> Any:  # noqa: ANN401  pyarrow has no types
    if name not in rows.column_names:
        return pa.array([""] * rows.num_rows, pa.string())
    column = rows[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(pa.string())
    return column.fill_null("") if pa.types.is_string(column.type) else column


def _service(name: str, namespace: str, workload: str, container: str) -> str:
    """The label `service`, as agents have it in their own metrics."""
    labels = {"namespace": namespace, "workload": workload, "container": container}
    more = {label: text for label, text in labels.items() if text}
    if not more:
        return name
    attributes = {_K8S[label]: text for label, text in more.items() if label in _K8S}
    kind, _, of_kind = workload.partition("/")
    if of_kind:
        attributes |= {
            "k8s.workload.kind": kind,
            "k8s.workload.name": of_kind,
            f"k8s.{kind}.name": of_kind,
        }
    return Service(name, more, attributes)


class Buckets:
    """A histogram of Prometheus with upper BOUNDS, of values of which a second has PER_S, from
    columns `PREFIX_e6` (up to 2^7), `PREFIX_le_500` and so on, each of which counts its own slot.
    A slot goes to the bucket that has all of it."""

    def __init__(self, prefix: str, bounds: Sequence[int], per_s: float) -> None:
        self.size = len(bounds) + 1
        self._prefix = f"{prefix}_"
        self._bounds = bounds
        self._ends = tuple(le(bound / per_s) for bound in (*bounds, float("inf")))

    def of(self, figures: Mapping[str, int]) -> list[int]:
        """The count of each bucket, not cumulative, of shape (size,)."""
        counts = [0] * self.size
        for name, count in figures.items():
            if count and name.startswith(self._prefix):
                slot = _SLOT.fullmatch(name, len(self._prefix))
                if slot:
                    counts[self._bucket(*slot.groups())] += count
        return counts

    def cumulative(self, counts: Sequence[int]) -> list[tuple[str, float]]:
        """COUNTS as prometheus-client wants them."""
        total, found = 0, []
        for end, count in zip(self._ends, counts, strict=True):
            total += count
            found.append((end, float(total)))
        return found

    def _bucket(self, exponent: str | None, bound: str | None) -> int:
        if bound == "inf":
            return self.size - 1
        upper = 2 ** (int(exponent) + 1) if exponent else int(bound or 0)
        return bisect_left(self._bounds, upper)
