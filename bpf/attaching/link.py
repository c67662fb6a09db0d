"""The link between a loaded program and its hook: it lasts until it is detached."""

from __future__ import annotations

import os
from typing import Protocol, Self

from coral.bpf.closing import close_all
from coral.bpf.libbpf import AttachError, BpfError, call, call_pointer, capture_log, last_errno


class Link(Protocol):
    """One attachment of one program."""

    def detach(self) -> None:
        """Detaches the program from the hook. Safe to call twice. Raises `BpfError` or OSError."""


class FdLink:
    """An attachment that lasts as long as a descriptor, which it owns."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def detach(self) -> None:
        """See `Link`."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class LibbpfLink:
    """An attachment that libbpf makes."""

    def __init__(self, link: int) -> None:
        self._link = link

    @classmethod
    def of(cls, program: int) -> Self:
        """Attaches a libbpf program to the hook of its section. Raises `AttachError`."""
        with capture_log() as said:
            link = call_pointer("bpf_program__attach", program)
            if not link:
                raise AttachError("attaching a program", last_errno(), said())
        return cls(link)

    def detach(self) -> None:
        """See `Link`."""
        link, self._link = self._link, 0
        if link and (error := -call("bpf_link__destroy", link)):
            raise BpfError("detaching a program", error)


class Links:
    """The links of one owner. A link that is detached is forgotten."""

    def __init__(self) -> None:
        self._kept: set[_Kept] = set()

    def __bool__(self) -> bool:
        return bool(self._kept)

    def keep(self, link: Link) -> Link:
        """Takes over a link; what is returned stands for it."""
        kept = _Kept(link, self._kept)
        self._kept.add(kept)
        return kept

    def detach(self) -> None:
        """Detaches all of them, whatever fails; see `close_all`."""
        close_all([kept.detach for kept in tuple(self._kept)])


class _Kept:
    def __init__(self, link: Link, kept: set[_Kept]) -> None:
        self._link, self._others = link, kept

    def detach(self) -> None:
        """See `Link`."""
        self._others.discard(self)
        self._link.detach()
