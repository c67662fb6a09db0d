"""What a loader is asked for, and what it gives back: the same for each loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from coral.bpf.attaching.link import Link
from coral.bpf.loading.object_file import ObjectFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Which parts of an object to load, and how; `BpfObject` says what each means."""

    programs: tuple[str, ...]
    walks: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    map_entries: Mapping[str, int] = field(default_factory=dict)
    map_flags: Mapping[str, int] = field(default_factory=dict)
    without_maps: frozenset[str] = frozenset()
    shared: Mapping[str, int] = field(default_factory=dict)
    typed: bool = False
    many_places: bool = False

    @property
    def chosen(self) -> tuple[str, ...]:
        """The programs to load."""
        return (*self.programs, *self.walks)


class Loaded(Protocol):
    """An object in the kernel. Names of maps, programs and variables that it does not have are
    KeyErrors."""

    def map_fd(self, name: str) -> int:
        """The descriptor of a map; negative if it was not made."""

    def program_fd(self, name: str) -> int:
        """The descriptor of a loaded program."""

    def made_maps(self) -> Iterable[int]:
        """The descriptors of all maps that this object made, those of global variables included."""

    def read_variable(self, name: str) -> Any:  # noqa: ANN401  its type is the C type's
        """The present value of a global variable."""

    def write_variable(self, name: str, value: object) -> None:
        """Sets a global variable."""

    def write_elements(self, name: str, indices: Sequence[int], value: object) -> None:
        """Sets elements of a global array, and no other bytes."""

    def attach(self, name: str) -> Link:
        """Attaches a program to the hook that its section names. Raises `AttachError`."""

    def close(self) -> None:
        """Frees everything. Safe to call twice."""


Loader = Callable[[ObjectFile, Description], Loaded]
