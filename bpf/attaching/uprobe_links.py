"""How programs get to functions of user space: by a link for many places at once where the kernel
has that (Linux 6.6), otherwise by a perf event for each place.

A link needs CAP_BPF and CAP_PERFMON; a perf event of this kind needs CAP_SYS_ADMIN. One link is
attached and detached several times as fast as perf events for the same places, and its programs run
sooner at each hit, because nothing prepares a perf sample: docs/kernels.md has the figures. A
program is loaded for one of the two ways (`BpfObject`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

from coral.bpf.attaching.each_cpu import online_cpus
from coral.bpf.attaching.link import FdLink, Link
from coral.bpf.buffers.perf_event import IOC_ENABLE, IOC_SET_BPF, open_perf_event
from coral.bpf.closing import close_all
from coral.bpf.libbpf import AttachError

_PMU: Final = Path("/sys/bus/event_source/devices/uprobe")
# libbpf only knows the link for many since version 1.3: bpf(2) itself makes both kinds.
_SYS_BPF: Final = {"x86_64": 321, "aarch64": 280}
_LINK_CREATE: Final = 28
_PERF_EVENT, _UPROBE_MULTI = 41, 48  # of enum bpf_attach_type
_AT_RETURN: Final = 1  # BPF_F_UPROBE_MULTI_RETURN
# Of union bpf_attr: descriptor of the program, target, type, flags; then that of each type.
_LINK: Final = struct.Struct("=IIII")
_OF_EVENT: Final = struct.Struct("=Q")  # cookie
_OF_MANY: Final = struct.Struct("=QQQQIII4x")  # path, offsets, counters, cookies, count, flags, pid
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def attach_many(
    program_fd: int, path: str, cookies: Mapping[int, int], *, at_return: bool = False
) -> Link:
    """Attaches a program that is loaded for many places to the offsets of COOKIES in the file PATH,
    where it finds their cookies. Raises `AttachError`: EBADF if PATH is no regular file."""
    named = ctypes.create_string_buffer(os.fsencode(path))
    numbers = ctypes.c_uint64 * len(cookies)
    offsets, values = numbers(*cookies), numbers(*cookies.values())
    more = _OF_MANY.pack(
        *(ctypes.addressof(each) for each in (named, offsets)),
        0,
        ctypes.addressof(values),
        len(cookies),
        _AT_RETURN if at_return else 0,
        0,
    )
    return FdLink(_link(_at(cookies), program_fd, 0, _UPROBE_MULTI, more))


def attach_each(
    program_fd: int, path: str, cookies: Mapping[int, int], *, at_return: bool = False
) -> Link:
    """The same with a program that is loaded for single places. Cookies other than 0 need Linux
    5.15. Raises `AttachError`."""
    attached = _Several()
    try:
        for offset, cookie in cookies.items():
            attached.fds.append(_event(path, offset, at_return=at_return))
            event = attached.fds[-1]
            if cookie:
                more = _OF_EVENT.pack(cookie)
                attached.fds.append(_link(_at([offset]), program_fd, event, _PERF_EVENT, more))
            else:
                _set_program(event, program_fd, offset)
            fcntl.ioctl(event, IOC_ENABLE, 0)
    except BaseException:
        attached.detach()
        raise
    return attached


class _Several:
    """Attachments that last as long as descriptors, which it owns."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def detach(self) -> None:
        """See `Link`."""
        fds, self.fds = self.fds, []
        close_all([FdLink(fd).detach for fd in reversed(fds)])


def _at(offsets: Mapping[int, int] | list[int]) -> str:
    return f"attaching a uprobe at offset {', '.join(f'{offset:#x}' for offset in offsets)}"


def _link(what: str, program_fd: int, target: int, type_: int, more: bytes) -> int:
    attributes = _LINK.pack(program_fd, target, type_, 0) + more
    number = _SYS_BPF.get(platform.machine())
    if number is None:
        raise AttachError(what, errno.EOPNOTSUPP)
    fd: int = _LIBC.syscall(
        ctypes.c_long(number),
        ctypes.c_int(_LINK_CREATE),
        attributes,
        ctypes.c_uint(len(attributes)),
    )
    if fd < 0:
        raise AttachError(what, ctypes.get_errno())
    return fd


def _event(path: str, offset: int, *, at_return: bool) -> int:
    try:
        type_, config = _pmu()
        named = ctypes.create_string_buffer(os.fsencode(path))
        return open_perf_event(
            type_,
            config if at_return else 0,
            online_cpus()[0],  # counts there, but runs its program on every CPU
            config1=ctypes.addressof(named),
            config2=offset,
        )
    except OSError as error:
        why = ", which needs CAP_SYS_ADMIN" if error.errno == errno.EACCES else ""
        raise AttachError(
            f"{_at([offset])} by a perf event{why}", error.errno or errno.EIO
        ) from error


def _set_program(event: int, program_fd: int, offset: int) -> None:
    try:
        fcntl.ioctl(event, IOC_SET_BPF, program_fd)
    except OSError as error:
        raise AttachError(_at([offset]), error.errno or errno.EIO) from error


@cache
def _pmu() -> tuple[int, int]:
    """The type of uprobe events, and the value of `config` that means returns. Raises OSError: the
    kernel has none before 4.17, or without CONFIG_UPROBE_EVENTS."""
    bit = (_PMU / "format/retprobe").read_text().strip().removeprefix("config:")
    return int((_PMU / "type").read_text()), 1 << int(bit)
