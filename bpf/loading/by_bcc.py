"""The second loader: the same object, with its programs compiled on this machine by bcc.

For kernels without BTF. The built object still describes the programs, maps, options and the layout
of every record. Only the instructions are compiled again, with the kernel's own headers; this
module creates the maps and writes their descriptors and the options' values into the instructions
(bpf/include/portable.bpf.h is the other half). A global variable is an array map, because older
kernels have no other kind.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint32, c_void_p
from functools import partial
from typing import Any, Final

import numpy as np

from coral.bpf.attaching.link import Link
from coral.bpf.attaching.tracepoints import raw_tracepoint
from coral.bpf.buffers.maps import HashMap
from coral.bpf.closing import close_all
from coral.bpf.libbpf import LoadError, call, capture_log
from coral.bpf.loading import bcc
from coral.bpf.loading.btf import NoLayoutError
from coral.bpf.loading.by_libbpf import RAW_TP, VERIFIER_LOG_BYTES
from coral.bpf.loading.description import Description
from coral.bpf.loading.map_definition import ARRAY, MapDefinition
from coral.bpf.loading.object_file import ObjectFile

_TWIN: Final = "_twin"  # a program NAME_twin has the same code as NAME
_LOAD_64: Final = 0x18  # a 64-bit constant, in two instructions
_PSEUDO_MAP_FD: Final = 1
_LOAD_MAP, _LOAD_OPTION = 14, 15  # as in portable.bpf.h
_NO_MAP: Final = -1
_VARIABLES_FROM: Final = 1000  # numbers of variables that are maps, behind those of maps
_NAME_BYTES: Final = 15
_READ_ONLY: Final = ".rodata"
# The kinds of programs that need no BTF.
_KINDS: Final = (RAW_TP, "perf_event", "uprobe", "uretprobe")

_INSTRUCTION: Final = np.dtype(
    [("code", "u1"), ("registers", "u1"), ("offset", "i2"), ("imm", "i4")]
)


class _ProgramOptions(ctypes.Structure):
    """struct bpf_prog_load_opts of libbpf."""

    _fields_ = (
        ("size", c_size_t),
        ("attempts", c_int),
        ("expected_attach_type", c_int),
        ("prog_btf_fd", c_uint32),
        ("prog_flags", c_uint32),
        ("prog_ifindex", c_uint32),
        ("kern_version", c_uint32),
        ("attach_btf_id", c_uint32),
        ("attach_prog_fd", c_uint32),
        ("attach_btf_obj_fd", c_uint32),
        ("fd_array", c_void_p),
        ("func_info", c_void_p),
        ("func_info_cnt", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("line_info", c_void_p),
        ("line_info_cnt", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("log_level", c_uint32),
        ("log_size", c_uint32),
        ("log_buf", c_char_p),
    )


class LoadedByBcc:
    """See `Loaded`."""

    def __init__(self, file: ObjectFile, description: Description) -> None:
        self._file, self._shared = file, description.shared
        self._maps: dict[str, int] = {}  # descriptors, as in the next one
        self._programs: dict[str, int] = {}
        self._variables: dict[str, HashMap] = {}
        try:
            self._load(description)
        except BaseException:
            self.close()
            raise

    def _load(self, description: Description) -> None:
        file = self._file
        options, variables = self._split_variables()
        maps = [name for name in file.maps if "." not in name]  # not those of sections
        numbers = {
            **{f"MAP_{name}": number for number, name in enumerate(maps)},
            **{f"MAP_{name}": _VARIABLES_FROM + n for n, name in enumerate(variables)},
            **{f"OPTION_{name}": number for number, name in enumerate(options)},
        }
        source = file.path.with_suffix("").with_suffix(".bpf.c")
        # All programs that can be attached, not only the chosen ones: this takes no longer, and the
        # next rung or request finds its programs compiled.
        attachable = tuple(
            name
            for name in file.programs
            if file.hook_of(name)[0] in _KINDS and not name.endswith(_TWIN)
        )
        compiled = bcc.compiled(source, attachable, tuple(numbers.items()))
        for name in maps:
            if name not in description.without_maps:
                self._make_map(name)
        for name in variables:
            self._make_variable(name)
        fds = {number: self._maps[name] for number, name in enumerate(maps) if name in self._maps}
        fds |= {_VARIABLES_FROM + n: self._variables[name].fd for n, name in enumerate(variables)}
        values = [int(file.initial_value(name)[()]) for name in options]
        for name in description.chosen:
            self._load_program(name, _linked(compiled[name.removesuffix(_TWIN)], fds, values))

    def _split_variables(self) -> tuple[list[str], list[str]]:
        """The names of the variables that are constants of programs, and of those that are maps."""
        options: list[str] = []
        variables: list[str] = []
        for name, variable in self._file.btf.variables.items():
            if not self._file.section_map(variable.section):  # a function of the kernel
                continue
            try:
                _, dtype = self._file.described(name)
            except NoLayoutError:  # a pointer, declared to put its type into the BTF
                continue
            scalar = dtype.shape == () and dtype.names is None
            (options if variable.section == _READ_ONLY and scalar else variables).append(name)
        return options, variables

    def _make_map(self, name: str) -> None:
        definition = self._file.definitions[name]
        if name in self._shared:
            self._maps[name] = os.dup(self._shared[name])
        elif definition.inner:
            prototype = definition.inner.create()
            try:
                self._maps[name] = definition.create(prototype)
            finally:
                os.close(prototype)
        else:
            self._maps[name] = definition.create()

    def _make_variable(self, name: str) -> None:
        """Creates an array map with the elements of the variable, and their initial values."""
        initial = np.atleast_1d(self._file.initial_value(name))
        fd = MapDefinition(name, ARRAY, 4, initial.dtype.itemsize, len(initial), 0).create()
        variable = HashMap(name, fd, ARRAY, np.dtype(np.uint32), initial.dtype)
        self._variables[name] = variable
        for index in np.flatnonzero(initial != np.zeros(1, initial.dtype)).tolist():
            variable.write(index, initial[index])

    def _load_program(self, name: str, instructions: np.ndarray[Any, Any]) -> None:
        log = ctypes.create_string_buffer(VERIFIER_LOG_BYTES)
        options = _ProgramOptions(
            size=ctypes.sizeof(_ProgramOptions),
            log_buf=ctypes.cast(log, c_char_p),
            log_size=VERIFIER_LOG_BYTES,
        )
        with capture_log() as said:
            fd = call(
                "bpf_prog_load",
                call("bpf_program__type", self._file.programs[name]),
                name[:_NAME_BYTES].encode(),
                b"GPL",
                instructions.ctypes.data,
                c_size_t(len(instructions)),
                byref(options),
            )
        if fd < 0:
            verifier_log = log.value.decode(errors="replace")
            raise LoadError(f"loading {name}, compiled by bcc", -fd, verifier_log or said())
        self._programs[name] = fd

    def map_fd(self, name: str) -> int:
        """See `Loaded`."""
        return self._maps.get(name, -1)

    def program_fd(self, name: str) -> int:
        """See `Loaded`."""
        return self._programs[name]

    def made_maps(self) -> Iterable[int]:
        """See `Loaded`."""
        maps = [fd for name, fd in self._maps.items() if name not in self._shared]
        return [*maps, *(variable.fd for variable in self._variables.values())]

    def read_variable(self, name: str) -> Any:  # noqa: ANN401
        """See `Loaded`; from the variable's map."""
        _, values = self._variables[name].read()
        return values if self._file.described(name)[1].shape else values[0]

    def write_variable(self, name: str, value: object) -> None:
        """See `Loaded`; into the variable's map."""
        self._variables[name].write(0, value)

    def write_elements(self, name: str, indices: Sequence[int], value: object) -> None:
        """See `Loaded`; into the variable's map."""
        for index in indices:
            self._variables[name].write(index, value)

    def attach(self, name: str) -> Link:
        """See `Loaded`."""
        _, hook = self._file.hook_of(name)
        return raw_tracepoint(self.program_fd(name), hook)

    def close(self) -> None:
        """See `Loaded`."""
        variables = [variable.fd for variable in self._variables.values()]
        fds = [*self._programs.values(), *self._maps.values(), *variables]
        self._maps, self._programs, self._variables = {}, {}, {}
        close_all([*(partial(os.close, fd) for fd in fds), self._file.close])


def _linked(code: bytes, fds: dict[int, int], values: Sequence[int]) -> np.ndarray[Any, Any]:
    """Instructions with numbers replaced by the descriptors of maps and the values of options."""
    instructions = np.frombuffer(bytearray(code), _INSTRUCTION)
    registers, constants = instructions["registers"], instructions["imm"]
    wide = instructions["code"] == _LOAD_64
    at = np.flatnonzero(wide & (registers >> 4 == _LOAD_MAP))
    found = np.array([fds.get(number, _NO_MAP) for number in constants[at].tolist()], np.int32)
    # A map that was not created is a 0: the verifier sees that nothing uses it.
    registers[at] = registers[at] & 0xF | np.where(found == _NO_MAP, 0, _PSEUDO_MAP_FD << 4)
    constants[at] = np.where(found == _NO_MAP, 0, found)
    at = np.flatnonzero(wide & (registers >> 4 == _LOAD_OPTION))
    registers[at] ^= _LOAD_OPTION << 4
    halves = np.array(values, np.uint64)[constants[at]].view(np.int32).reshape(-1, 2)
    constants[at], constants[at + 1] = halves.T
    return instructions
