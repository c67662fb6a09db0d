"""Programs attached to the kernel's tracepoints."""

from __future__ import annotations

from coral.bpf.attaching.link import FdLink
from coral.bpf.libbpf import AttachError, call


def raw_tracepoint(program_fd: int, name: str | None) -> FdLink:
    """Attaches a program to the raw tracepoint NAME; None if the program was loaded for one, or for
    a function, with its types. Raises `AttachError`."""
    fd = call("bpf_raw_tracepoint_open", name and name.encode(), program_fd)
    if fd < 0:
        raise AttachError("attaching a program", -fd)
    return FdLink(fd)
