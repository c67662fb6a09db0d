"""libbpf as typed Python: the one place that knows ctypes signatures.

The library is opened at the first use, so that this module imports on any machine. Every failure
is a `BpfError` that carries the errno and, where the verifier or libbpf said something, their log.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Final

_LIBRARY_NAME: Final = "libbpf.so.1"
_LOG_TAIL_LINES: Final = 12
# What is short at the moment, and may not be later.
EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
# What to do about an errno, where it says by itself.
_REMEDIES: Final = {
    errno.EMFILE: "the agent has as many files open as it may: raise its LimitNOFILE (ulimit -n)",
    errno.ENFILE: "this machine has as many files open as it may: raise fs.file-max",
    errno.ENOMEM: (
        "there is no memory left for it: ask for smaller buffers, or raise the agent's MemoryMax, "
        "its container's limit"
    ),
    errno.EPERM: (
        "it takes CAP_BPF and CAP_PERFMON, no policy or lockdown of the kernel against it, and "
        "for memory that is locked CAP_IPC_LOCK or a LimitMEMLOCK that is large enough"
    ),
}
_LEVEL_DEBUG: Final = 2
_LIBC: Final = ctypes.CDLL(None)

_PRINT_CALLBACK = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)

_SIGNATURES: Final[dict[str, tuple[type | None, Sequence[type]]]] = {
    "libbpf_num_possible_cpus": (c_int, ()),
    "libbpf_version_string": (c_char_p, ()),
    "bpf_object__open_mem": (c_void_p, (c_char_p, c_size_t, c_void_p)),
    "bpf_object__load": (c_int, (c_void_p,)),
    "bpf_object__close": (None, (c_void_p,)),
    "bpf_object__next_program": (c_void_p, (c_void_p, c_void_p)),
    "bpf_object__next_map": (c_void_p, (c_void_p, c_void_p)),
    "bpf_object__btf": (c_void_p, (c_void_p,)),
    "btf__load_vmlinux_btf": (c_void_p, ()),
    "btf__free": (None, (c_void_p,)),
    "btf__raw_data": (c_void_p, (c_void_p, POINTER(c_uint32))),
    "bpf_program__name": (c_char_p, (c_void_p,)),
    "bpf_program__section_name": (c_char_p, (c_void_p,)),
    "bpf_program__type": (c_int, (c_void_p,)),
    "bpf_program__fd": (c_int, (c_void_p,)),
    "bpf_program__set_autoload": (c_int, (c_void_p, c_bool)),
    "bpf_program__set_log_buf": (c_int, (c_void_p, c_void_p, c_size_t)),
    "bpf_program__attach": (c_void_p, (c_void_p,)),
    "bpf_link__destroy": (c_int, (c_void_p,)),
    "bpf_map__name": (c_char_p, (c_void_p,)),
    "bpf_map__fd": (c_int, (c_void_p,)),
    "bpf_map__type": (c_int, (c_void_p,)),
    "bpf_map__key_size": (c_uint32, (c_void_p,)),
    "bpf_map__value_size": (c_uint32, (c_void_p,)),
    "bpf_map__max_entries": (c_uint32, (c_void_p,)),
    "bpf_map__set_max_entries": (c_int, (c_void_p, c_uint32)),
    "bpf_map__map_flags": (c_uint32, (c_void_p,)),
    "bpf_map__set_map_flags": (c_int, (c_void_p, c_uint32)),
    "bpf_map__btf_key_type_id": (c_uint32, (c_void_p,)),
    "bpf_map__btf_value_type_id": (c_uint32, (c_void_p,)),
    "bpf_map__set_autocreate": (c_int, (c_void_p, c_bool)),
    "bpf_map__initial_value": (c_void_p, (c_void_p, POINTER(c_size_t))),
    "bpf_map_lookup_elem": (c_int, (c_int, c_void_p, c_void_p)),
    "bpf_map_update_elem": (c_int, (c_int, c_void_p, c_void_p, c_uint64)),
    "bpf_map_delete_elem": (c_int, (c_int, c_void_p)),
    "bpf_map_get_next_key": (c_int, (c_int, c_void_p, c_void_p)),
    "bpf_map_lookup_batch": (
        c_int,
        (c_int, c_void_p, c_void_p, c_void_p, c_void_p, POINTER(c_uint32), c_void_p),
    ),
    "bpf_map_lookup_and_delete_batch": (
        c_int,
        (c_int, c_void_p, c_void_p, c_void_p, c_void_p, POINTER(c_uint32), c_void_p),
    ),
    "bpf_map_delete_batch": (c_int, (c_int, c_void_p, POINTER(c_uint32), c_void_p)),
    "bpf_map_create": (c_int, (c_int, c_char_p, c_uint32, c_uint32, c_uint32, c_void_p)),
    "bpf_prog_load": (c_int, (c_int, c_char_p, c_char_p, c_void_p, c_size_t, c_void_p)),
    "bpf_raw_tracepoint_open": (c_int, (c_char_p, c_int)),
    "bpf_program__attach_iter": (c_void_p, (c_void_p, c_void_p)),
    "bpf_link__fd": (c_int, (c_void_p,)),
    "bpf_iter_create": (c_int, (c_int,)),
    "bpf_prog_test_run_opts": (c_int, (c_int, c_void_p)),
    "bpf_enable_stats": (c_int, (c_int,)),
    "libbpf_probe_bpf_map_type": (c_int, (c_int, c_void_p)),
}


class BpfError(Exception):
    """A call into the kernel or libbpf that failed.

    `errno` is positive, or 0 where there is none; `log` holds what the verifier or libbpf said,
    whole; the message holds its last lines.
    """

    def __init__(self, what: str, errno_: int = 0, log: str = "") -> None:
        self.what = what
        self.errno = errno_
        self.log = log
        reason = (
            f": {errno.errorcode.get(errno_, errno_)} ({os.strerror(errno_)})" if errno_ else ""
        )
        remedy = f"; {_REMEDIES[errno_]}" if errno_ in _REMEDIES else ""
        tail = log_tail(log)
        super().__init__(f"{what}{reason}{remedy}" + (f"\n{tail}" if tail else ""))


class LibbpfMissingError(BpfError):
    """libbpf is not on this machine, or too old."""


class LoadError(BpfError):
    """The kernel refused a program or a map, or the object does not fit this kernel."""


class AttachError(BpfError):
    """A program was loaded and its hook could not be taken."""


def log_tail(log: str, lines: int = _LOG_TAIL_LINES) -> str:
    """The last LINES lines of LOG that say something."""
    return "\n".join([line for line in log.splitlines() if line.strip()][-lines:])


class _Said(threading.local):
    """What libbpf printed during a call, for each thread."""

    def __init__(self) -> None:
        self.lines: list[str] | None = None


_said = _Said()


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY_NAME, use_errno=True)
        for name, (restype, argtypes) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype = restype
            function.argtypes = argtypes
    except (OSError, AttributeError) as error:
        raise LibbpfMissingError(
            f"{_LIBRARY_NAME} (1.0 or later) cannot be used: {error}; "
            "install Debian's libbpf1, or your distribution's libbpf"
        ) from error
    library.libbpf_set_print.argtypes = (_PRINT_CALLBACK,)
    library.libbpf_set_print(_print_callback)
    return library


@_PRINT_CALLBACK  # type: ignore[untyped-decorator]
def _print_callback(level: int, fmt: bytes, va_list: int) -> int:
    if level == _LEVEL_DEBUG:
        return 0  # some four hundred lines a load
    # A va_list arrives as a pointer on x86-64 (an array type) and on arm64 (a large struct).
    if _said.lines is not None:
        buffer = ctypes.create_string_buffer(4096)
        _LIBC.vsnprintf(buffer, c_size_t(len(buffer)), fmt, c_void_p(va_list))
        _said.lines.append(buffer.value.decode(errors="replace"))
    return 0


@contextmanager
def capture_log() -> Iterator[Callable[[], str]]:
    """Collects what libbpf prints in this thread; yields a function that returns it so far."""
    lines: list[str] = []
    _said.lines = lines
    try:
        yield lambda: "".join(lines)
    finally:
        _said.lines = None


def call(name: str, *args: object) -> int:
    """Calls a libbpf function that returns an int; its value, -errno where it failed."""
    value: int = getattr(_library(), name)(*args)
    return value


def call_pointer(name: str, *args: object) -> int:
    """Calls a libbpf function that returns a pointer; 0 where it failed, with `last_errno` set."""
    value: int | None = getattr(_library(), name)(*args)
    return value or 0


def call_string(name: str, *args: object) -> str:
    """Calls a libbpf function that returns a C string."""
    value: bytes | None = getattr(_library(), name)(*args)
    return (value or b"").decode()


def last_errno() -> int:
    """errno as the last call in this thread left it."""
    return ctypes.get_errno()


def version() -> str:
    """The library's version, as `v1.1`. Raises `LibbpfMissingError`."""
    return call_string("libbpf_version_string")


def release_memory() -> None:
    """Gives freed memory back to the system. libbpf reads all of the kernel's BTF to load an
    object, some 20 MB, and glibc would keep it for the life of the process."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim:
        trim(0)


@cache
def possible_cpus() -> int:
    """How many slots a per-CPU map's value has on this machine."""
    count = call("libbpf_num_possible_cpus")
    if count < 0:
        raise BpfError("counting the possible CPUs", -count)
    return count
