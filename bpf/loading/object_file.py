"""A compiled object as libbpf opens it: its programs, maps, global variables and types. Nothing
here is in the kernel, apart from maps that are made before the object is loaded."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Mapping
from ctypes import byref, c_char_p, c_size_t, c_uint32
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coral.bpf.libbpf import (
    LoadError,
    call,
    call_pointer,
    call_string,
    capture_log,
    last_errno,
)
from coral.bpf.loading import seal, signed
from coral.bpf.loading.btf import Btf, Variable
from coral.bpf.loading.map_definition import MapDefinition


def object_path(name: str) -> Path:
    """The path of the object NAME: beside its source, or in the directory CORAL_BPF_OBJECTS."""
    directory = os.environ.get(signed.ENV_OBJECT_DIR)
    return (Path(directory) if directory else signed.PROGRAMS / name) / f"{name}.bpf.o"


def not_built(path: Path) -> str:
    """The message for a missing object."""
    if signed.ENV_OBJECT_DIR in os.environ:
        variable = signed.ENV_OBJECT_DIR
        return f"{path} is missing: let {variable} name a directory of built programs"
    return f"{path.name} is not built: run `make setup`"


class _OpenOptions(ctypes.Structure):
    """struct bpf_object_open_opts of libbpf, with the members used here."""

    _fields_ = (("size", c_size_t), ("object_name", c_char_p))


class ObjectFile:
    """An open object. `programs` and `maps` are libbpf's, by name; `definitions` are the maps as
    they are to be made; `made` are the descriptors of those that were made before it is loaded.
    Raises `LoadError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.programs: Mapping[str, int] = {}
        self.maps: Mapping[str, int] = {}
        self.definitions: dict[str, MapDefinition] = {}
        self.made: dict[str, int] = {}
        self.handle = self._open()
        try:
            self.btf = self._read_btf()
            self.programs = dict(self._children("program"))
            self.maps = dict(self._children("map"))
            # libbpf forgets prototypes, and types if the kernel only accepts the map without them.
            self.definitions = {
                name: MapDefinition.of(name, bpf_map) for name, bpf_map in self.maps.items()
            }
        except BaseException:
            self.close()
            raise

    def _open(self) -> int:
        what = f"opening {self.path.name}"
        try:
            data = self.path.read_bytes()
            signed.check(self.path.name, data)
            elf = seal.opened(data)
        except OSError as error:
            why = "" if self.path.exists() else not_built(self.path)
            raise LoadError(what, error.errno or errno.EIO, why) from error
        except (seal.DamagedError, signed.UnsignedError) as error:
            raise LoadError(f"{what}: {error}; install the agent anew") from error
        # libbpf names the maps of sections after it, as it does with the name of a file.
        name = self.path.name.partition(".")[0].encode()
        options = _OpenOptions(ctypes.sizeof(_OpenOptions), name)
        with capture_log() as said:
            handle = call_pointer("bpf_object__open_mem", elf, c_size_t(len(elf)), byref(options))
            if not handle:
                raise LoadError(what, last_errno(), said())
        return handle

    def _read_btf(self) -> Btf:
        size = c_uint32()
        btf = call_pointer("bpf_object__btf", self.handle)
        raw = call_pointer("btf__raw_data", btf, byref(size)) if btf else 0
        if not raw:
            raise LoadError(f"{self.path.name} has no BTF: compile it with -g")
        return Btf(ctypes.string_at(raw, size.value))

    def _children(self, kind: str) -> Iterator[tuple[str, int]]:
        child = 0
        while child := call_pointer(f"bpf_object__next_{kind}", self.handle, child or None):
            yield call_string(f"bpf_{kind}__name", child), child

    def hook_of(self, program: str) -> tuple[str, str]:
        """The kind and the name of a program's hook, as in its section."""
        section = call_string("bpf_program__section_name", self.programs[program])
        kind, _, hook = section.partition("/")
        return kind, hook

    def change_map(self, name: str, entries: int | None, flags: int | None) -> None:
        """Gives a map, or the prototype of the maps in it, another size or other flags."""
        self.definitions[name] = changed = self.definitions[name].changed(entries, flags)
        call("bpf_map__set_max_entries", self.maps[name], changed.entries)
        call("bpf_map__set_map_flags", self.maps[name], changed.flags)

    def make_map(self, name: str) -> None:
        """Makes a map before the object is loaded. Raises `LoadError`."""
        definition, prototype = self.definitions[name], 0
        try:
            if definition.inner:
                prototype = definition.inner.create()
            self.made[name] = definition.create(prototype)
        finally:
            if prototype:
                os.close(prototype)

    def described(self, variable: str) -> tuple[Variable, np.dtype[np.generic]]:
        """Where a global variable is, and its layout."""
        found = self.btf.variables[variable]
        return found, self.btf.dtype(found.type_id)

    def section_map(self, section: str) -> int:
        """The map of a section of global variables; 0 if there is none."""
        return next((m for name, m in self.maps.items() if name.endswith(section)), 0)

    def initial_value(self, name: str) -> NDArray[Any]:
        """The initial value of the global NAME, in its section, where it can be changed."""
        variable, dtype = self.described(name)
        size = c_size_t()
        section = self.section_map(variable.section)
        address = section and call_pointer("bpf_map__initial_value", section, byref(size))
        if not address:
            raise ValueError(f"it has no section {variable.section}")
        memory = memoryview((ctypes.c_char * size.value).from_address(address)).cast("B")
        return np.ndarray((), dtype, memory, variable.offset)

    def close(self) -> None:
        """Frees it, and what libbpf loaded of it. Safe to call twice."""
        made, self.made = self.made, {}
        for fd in made.values():
            os.close(fd)
        handle, self.handle = self.handle, 0
        if handle:
            call_pointer("bpf_object__close", handle)
