"""What a subscriber wants to see: compiled once, applied to whole arrays.

The rows themselves say which of their fields are a process, an error or a duration (the `meaning`
option of the contract), so no kind of collector is named here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from coral.collectors.contract import NO_ATTRIBUTES, EventRows, Summaries
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.mesh.v1 import options_pb2 as options
from coral.wire.kinds import fields_meaning, is_string_index, resource_field_of

_MAX_ERRNO: Final = 4095
_POD: Final = "k8s.pod.name"


@dataclass(frozen=True, slots=True)
class Filter:
    """Conditions that must all hold. An empty condition is not checked, and neither is one about
    something the rows do not have. Hashable: equal filters share one encoding.

    A summary passes if one of the events that it adds up could: its longest duration counts, and
    one error is enough. A row that adds up what `top` left out has no process and no name of its
    own, so conditions about these leave it out.
    """

    pids: frozenset[int] = frozenset()
    tids: frozenset[int] = frozenset()
    comms: frozenset[str] = frozenset()
    syscalls: frozenset[str] = frozenset()
    errors_only: bool = False
    min_duration_ns: int = 0
    pods: frozenset[str] = frozenset()
    _pids: NDArray[np.int64] = field(init=False, repr=False, compare=False)  # sorted
    _tids: NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_pids", _sorted(self.pids))
        object.__setattr__(self, "_tids", _sorted(self.tids))

    @classmethod
    def of(cls, wanted: pb.EventFilter) -> Self:
        """The filter that a request describes."""
        return cls(
            frozenset(wanted.pids),
            frozenset(wanted.tids),
            frozenset(wanted.comms),
            frozenset(wanted.syscalls),
            wanted.errors_only,
            wanted.min_duration_ns,
            frozenset(wanted.pods),
        )

    def __bool__(self) -> bool:
        return self is not EVERYTHING and self != EVERYTHING

    def mask(
        self, rows: EventRows | Summaries, attributes: Mapping[str, str] = NO_ATTRIBUTES
    ) -> NDArray[np.bool_]:
        """Which of ROWS pass, of shape (n,). ATTRIBUTES are what all of them have in common."""
        keep = np.empty(len(rows), bool)  # several times as fast as np.ones for a few rows
        keep.fill(True)
        if self.pids:
            for values in _columns(rows, options.MEANING_PID):
                keep &= _is_among(values, self._pids)
        if self.tids:
            for values in _columns(rows, options.MEANING_TID):
                keep &= _is_among(values, self._tids)
        if self.comms:
            keep &= _named(rows, options.MEANING_COMMAND, self.comms)
        if self.syscalls:
            keep &= _named(rows, options.MEANING_SYSCALL, self.syscalls)
        if self.errors_only:
            keep &= _failed(rows)
        for values in _columns(rows, options.MEANING_DURATION) if self.min_duration_ns else ():
            keep &= values >= self.min_duration_ns
        return keep & _of_pods(rows, attributes, self.pods) if self.pods else keep


def _sorted(numbers: frozenset[int]) -> NDArray[np.int64]:
    return np.array(sorted(numbers), np.int64)


def _is_among(values: NDArray[Any], numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of VALUES are among NUMBERS, which are sorted and at least one. Faster than np.isin,
    which sorts both at each call."""
    found: NDArray[np.bool_] = numbers[np.searchsorted(numbers[:-1], values)] == values
    return found


EVERYTHING: Final = Filter()


def _columns(rows: EventRows | Summaries, meaning: int) -> Iterator[NDArray[Any]]:
    """The columns of ROWS with that meaning, of shape (n,); those of strings as indices."""
    values = rows.records if isinstance(rows, EventRows) else rows.columns
    names = values.dtype.names or () if isinstance(values, np.ndarray) else values
    for each in fields_meaning(rows.message.DESCRIPTOR, meaning):
        if each.name in names:
            column: NDArray[Any] = values[each.name]
            yield column


def _named(rows: EventRows | Summaries, meaning: int, names: frozenset[str]) -> NDArray[np.bool_]:
    """Which of ROWS have one of NAMES in their columns with that meaning, of shape (n,)."""
    named = np.ones(len(rows), bool)
    passes = np.array([string in names for string in rows.strings], bool)
    for indices in _columns(rows, meaning):
        named &= passes[indices]
    return named


def _of_pods(
    rows: EventRows | Summaries, attributes: Mapping[str, str], names: frozenset[str]
) -> NDArray[np.bool_]:
    """Which of ROWS are of pods with one of NAMES, of shape (n,); ATTRIBUTES are those of all."""
    common = attributes.get(_POD, "")
    if not rows.resources:
        return np.full(len(rows), common in names)
    passes = [common in names, *(it.attributes.get(_POD, common) in names for it in rows.resources)]
    values: Any = rows.records if isinstance(rows, EventRows) else rows.columns
    found: NDArray[np.bool_] = np.array(passes, bool)[
        values[resource_field_of(rows.message.DESCRIPTOR)]
    ]
    return found


def _failed(rows: EventRows | Summaries) -> NDArray[np.bool_]:
    """Which of ROWS have an error; all where rows cannot have any."""
    failed = np.ones(len(rows), bool)
    for values in _columns(rows, options.MEANING_RETURN_VALUE):
        failed &= (values < 0) & (values >= -_MAX_ERRNO)
    for each in fields_meaning(rows.message.DESCRIPTOR, options.MEANING_ERROR):
        for values in _columns(rows, options.MEANING_ERROR):
            is_error = np.array(list(map(bool, rows.strings)), bool)
            failed &= is_error[values] if is_string_index(each) else values != 0
    return failed
