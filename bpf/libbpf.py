"""libbpf as typed Python: the one place that knows ctypes signatures.

The library is opened at its first use, so that this module can be imported on any machine. Every
failure is a `BpfError` with the errno and the log of the verifier or libbpf, if there is one.
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
from pathlib import Path
from typing import Final

_LIBRARY_NAME: Final = "libbpf.so.1"
_LOG_TAIL_LINES: Final = 12
VMLINUX_BTF: Final = Path("/sys/kernel/btf/vmlinux")
# Errors from a shortage that may pass.
EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
# Remedies for errors whose cause is plain.
_REMEDIES: Final = {
    errno.EMFILE: "the agent has reached its limit of open files: raise LimitNOFILE (ulimit -n)",
    errno.ENFILE: "this machine has reached its limit of open files: raise fs.file-max",
    errno.ENOMEM: (
        "there is not enough memory: ask for smaller buffers, or raise the agent's MemoryMax or "
        "its container's limit"
    ),
    errno.EPERM: (
        "it needs CAP_BPF and CAP_PERFMON, must not be forbidden by a security policy or kernel "
        "lockdown, and for locked memory needs CAP_IPC_LOCK or a sufficient LimitMEMLOCK"
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
    "bpf_program__set_type": (c_int, (c_void_p, c_int)),
    "bpf_program__set_expected_attach_type": (c_int, (c_void_p, c_int)),
    "bpf_program__set_attach_target": (c_int, (c_void_p, c_int, c_char_p)),
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
    "bpf_map__inner_map": (c_void_p, (c_void_p,)),
    "bpf_map__set_inner_map_fd": (c_int, (c_void_p, c_int)),
    "bpf_map__reuse_fd": (c_int, (c_void_p, c_int)),
    "bpf_map__set_autocreate": (c_int, (c_void_p, c_bool)),
    "bpf_map__initial_value": (c_void_p, (c_void_p, POINTER(c_size_t))),
    "bpf_map_lookup_elem": (c_int, (c_int, c_void_p, c_void_p)),
    "bpf_map_update_elem": (c_int, (c_int, c_void_p, c_void_p, c_uint64)),
    "bpf_map_delete_elem": (c_int, (c_int, c_void_p)),
    "bpf_map_get_next_key": (c_int, (c_int, c_void_p, c_void_p)),
    "bpf_map_update_batch": (c_int, (c_int, c_void_p, c_void_p, POINTER(c_uint32), c_void_p)),
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
    "bpf_link_create": (c_int, (c_int, c_int, c_int, c_void_p)),
    "bpf_iter_create": (c_int, (c_int,)),
    "bpf_prog_test_run_opts": (c_int, (c_int, c_void_p)),
    "bpf_enable_stats": (c_int, (c_int,)),
    "libbpf_probe_bpf_map_type": (c_int, (c_int, c_void_p)),
}


class BpfError(Exception):
    """A call into the kernel or libbpf that failed.

    `errno` is positive, or 0 if there is none; `log` is the full log of the verifier or libbpf; the
    message contains its last lines.
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
    """libbpf is not installed, or too old."""


class LoadError(BpfError):
    """The kernel refused a program or a map, or the object does not fit this kernel."""


class AttachError(BpfError):
    """A program was loaded but could not be attached to its hook."""


def log_tail(log: str, lines: int = _LOG_TAIL_LINES) -> str:
    """The last LINES lines of LOG that are not blank."""
    return "\n".join([line for line in log.splitlines() if line.strip()][-lines:])


class _Said(threading.local):
    """The output of libbpf during a call, per thread."""

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
        return 0  # about four hundred lines per load
    # A va_list arrives as a pointer on x86-64 (an array type) and on arm64 (a large struct).
    if _said.lines is not None:
        buffer = ctypes.create_string_buffer(4096)
        _LIBC.vsnprintf(buffer, c_size_t(len(buffer)), fmt, c_void_p(va_list))
        _said.lines.append(buffer.value.decode(errors="replace"))
    return 0


@contextmanager
def capture_log() -> Iterator[Callable[[], str]]:
    """Collects the output of libbpf in this thread; yields a function that returns it so far. Of
    nested blocks, the innermost gets the output."""
    lines: list[str] = []
    outer = _said.lines
    _said.lines = lines
    try:
        yield lambda: "".join(lines)
    finally:
        _said.lines = outer


def call(name: str, *args: object) -> int:
    """Calls a libbpf function that returns an int: its value, or -errno if it failed."""
    value: int = getattr(_library(), name)(*args)
    return value


def call_pointer(name: str, *args: object) -> int:
    """Calls a libbpf function that returns a pointer: 0 if it failed, with `last_errno` set."""
    value: int | None = getattr(_library(), name)(*args)
    return value or 0


def call_string(name: str, *args: object) -> str:
    """Calls a libbpf function that returns a C string."""
    value: bytes | None = getattr(_library(), name)(*args)
    return (value or b"").decode()


def last_errno() -> int:
    """The errno of the last failed call in this thread."""
    return ctypes.get_errno()


def version() -> str:
    """The library's version, as `v1.1`. Raises `LibbpfMissingError`."""
    return call_string("libbpf_version_string")


def release_memory() -> None:
    """Returns freed memory to the system. To load an object, libbpf reads all of the kernel's BTF,
    about 20 MB, which glibc would keep for the life of the process."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim:
        trim(0)


@cache
def possible_cpus() -> int:
    """The number of slots in a value of a per-CPU map on this machine."""
    count = call("libbpf_num_possible_cpus")
    if count < 0:
        raise BpfError("counting the possible CPUs", -count)
    return count
