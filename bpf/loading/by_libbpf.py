"""The first loader: libbpf relocates the object's programs for the running kernel (CO-RE) and
loads them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from ctypes import c_size_t
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf.attaching.link import LibbpfLink, Link
from coral.bpf.attaching.tracepoints import raw_tracepoint
from coral.bpf.closing import close_all
from coral.bpf.libbpf import VMLINUX_BTF, LoadError, call, capture_log
from coral.bpf.loading.description import Description
from coral.bpf.loading.object_file import ObjectFile

VERIFIER_LOG_BYTES: Final = 1 << 20
RAW_TP: Final = "raw_tp"
UPROBE: Final = "uprobe"
_TRACING: Final = 26  # BPF_PROG_TYPE_TRACING
_TRACE_RAW_TP: Final = 23
_UPROBE_MULTI: Final = 48
# libbpf retries a map that the kernel refuses without its types; if the map must have them, the
# second errno is meaningless.
_RETRIED: Final = re.compile(
    r"\((\w+)\):[^\n]*\(-(\d+)\)\. Retrying without BTF\.\n[^\n]*map '\1': failed to create"
)


class LoadedByLibbpf:
    """See `Loaded`."""

    def __init__(self, file: ObjectFile, description: Description) -> None:
        self._file, self._description = file, description
        self._sections: dict[str, mmap.mmap] = {}
        # One for all: loading ends with the first program that fails.
        log = ctypes.create_string_buffer(VERIFIER_LOG_BYTES)
        for name in description.chosen:
            self._choose(name, log)
        for name in file.programs.keys() - set(description.chosen):
            call("bpf_program__set_autoload", file.programs[name], False)
        with capture_log() as said, ExitStack() as prototypes:
            self._prepare_maps(prototypes)
            error = -call("bpf_object__load", file.handle)
        if error:
            verifier_log = log.value.decode(errors="replace")
            if retried := _RETRIED.search(said()):
                error = int(retried[2])
            raise LoadError(f"loading {file.path.name}", error, verifier_log or said())

    def _choose(self, name: str, log: ctypes.Array[ctypes.c_char]) -> None:
        """Has libbpf load a program, and puts into LOG what the verifier says if it refuses it."""
        if self._description.typed:
            self._give_types(name)
        if self._description.many_places and self._file.hook_of(name)[0] == UPROBE:
            call("bpf_program__set_expected_attach_type", self._file.programs[name], _UPROBE_MULTI)
        # libbpf first loads without a log, and requests one only if that fails.
        program = self._file.programs[name]
        call("bpf_program__set_autoload", program, True)
        call("bpf_program__set_log_buf", program, log, c_size_t(VERIFIER_LOG_BYTES))

    def _give_types(self, name: str) -> None:
        """Loads the raw tracepoint program NAME as one with typed arguments."""
        kind, hook = self._file.hook_of(name)
        if kind != RAW_TP:
            return
        program = self._file.programs[name]
        call("bpf_program__set_type", program, _TRACING)
        call("bpf_program__set_expected_attach_type", program, _TRACE_RAW_TP)
        with capture_log() as said:
            error = _with_types(
                lambda: -call("bpf_program__set_attach_target", program, 0, hook.encode())
            )
        if error:
            raise LoadError(f"loading {name} for the tracepoint {hook}", error, said())

    def _prepare_maps(self, prototypes: ExitStack) -> None:
        """Tells libbpf which maps not to make, and makes the PROTOTYPES of the maps in others,
        whose size libbpf cannot change."""
        for name, definition in self._file.definitions.items():
            bpf_map = self._file.maps[name]
            if name in self._description.without_maps:
                call("bpf_map__set_autocreate", bpf_map, False)
            elif (fd := self._given(name)) >= 0:
                if error := -call("bpf_map__reuse_fd", bpf_map, fd):
                    raise LoadError(f"sharing map {name}", error)
            elif definition.inner:
                fd = definition.inner.create()
                prototypes.callback(os.close, fd)
                call("bpf_map__set_inner_map_fd", bpf_map, fd)

    def _given(self, name: str) -> int:
        """The descriptor of a map that is made already; negative for others."""
        return self._description.shared.get(name, self._file.made.get(name, -1))

    def map_fd(self, name: str) -> int:
        """See `Loaded`."""
        return call("bpf_map__fd", self._file.maps[name])

    def program_fd(self, name: str) -> int:
        """See `Loaded`."""
        return call("bpf_program__fd", self._file.programs[name])

    def made_maps(self) -> Iterable[int]:
        """See `Loaded`."""
        made = self._file.maps.keys() - self._description.shared.keys()
        return [fd for name in made if (fd := self.map_fd(name)) >= 0]

    def _variable(self, name: str) -> NDArray[Any]:
        variable, dtype = self._file.described(name)
        if variable.section not in self._sections:
            bpf_map = self._file.section_map(variable.section)
            try:
                self._sections[variable.section] = mmap.mmap(
                    call("bpf_map__fd", bpf_map), call("bpf_map__value_size", bpf_map)
                )
            except OSError as error:
                what = f"mapping {variable.section} of {self._file.path.name}"
                raise LoadError(what, error.errno or errno.EIO) from error
        return np.ndarray((), dtype, self._sections[variable.section], variable.offset)

    def read_variable(self, name: str) -> Any:  # noqa: ANN401
        """See `Loaded`; a copy, because a view of the section would keep it from being unmapped."""
        return self._variable(name).copy()[()]

    def write_variable(self, name: str, value: object) -> None:
        """See `Loaded`."""
        self._variable(name)[...] = value

    def write_elements(self, name: str, indices: Sequence[int], value: object) -> None:
        """See `Loaded`."""
        self._variable(name)[list(indices)] = value

    def attach(self, name: str) -> Link:
        """See `Loaded`."""
        kind, hook = self._file.hook_of(name)
        if kind == RAW_TP:
            # A typed program is bound to its tracepoint when it is loaded.
            return raw_tracepoint(self.program_fd(name), None if self._description.typed else hook)
        return LibbpfLink.of(self._file.programs[name])

    def close(self) -> None:
        """See `Loaded`."""
        sections, self._sections = self._sections, {}
        close_all([*(section.close for section in sections.values()), self._file.close])


def _with_types(read: Callable[[], int]) -> int:
    """The errno of READ, which has libbpf read the kernel's types, or 0. libbpf says ESRCH,
    whatever keeps it from opening them."""
    error = read()
    if error == errno.ESRCH:
        try:
            os.close(os.open(VMLINUX_BTF, os.O_RDONLY))
        except OSError as failure:
            return failure.errno or error
        return read()  # another thread had the last descriptor for a moment
    return error
