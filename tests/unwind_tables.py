"""What binutils say about a file's unwind tables, to compare ours with."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coral.collectors.unwinding.rules import (
    CFA,
    CFA_OFFSET,
    FIRST_REGISTER,
    X86_64,
    Cfa,
    Machine,
    Rows,
    Saved,
    kind_of,
    offset_of,
    register_of,
)

_NAMES = ("rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)))
_ENTRY = re.compile(r"FDE cie=\S+ pc=([0-9a-f]+)\.\.([0-9a-f]+)")
_TWICE = re.compile(r" \(r\w+\)")  # a register's second name
_ROW = re.compile(r"([0-9a-f]{16}) (\S+)((?: +\S+)*) *$")


def section_of(path: Path, name: str = ".eh_frame") -> tuple[bytes, int]:
    """A section's bytes and its virtual address."""
    text = subprocess.check_output(["readelf", "-SW", path], text=True)
    found = re.search(rf" {re.escape(name)} +\S+ +([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+)", text)
    assert found, f"{path} has no {name}"
    address, offset, size = (int(number, 16) for number in found.groups())
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size), address


def rows_of_readelf(path: Path) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Of each row of each function: its address, its CFA, and its registers' rules. A row that
    another one of the function replaces at the same address is left out."""
    command = ["readelf", "--debug-dump=frames-interp", "-W", str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as running:
        assert running.stdout
        rows: dict[int, tuple[str, dict[str, str]]] = {}
        columns: list[str] = []
        first, last = 0, -1
        in_section = False
        for line in running.stdout:
            if line.startswith("Contents of the"):
                in_section = ".eh_frame" in line
            elif (entry := _ENTRY.search(line)) and in_section:
                yield from ((address, *row) for address, row in rows.items())
                rows.clear()
                first, last = int(entry[1], 16), int(entry[2], 16)
            elif " CIE " in line:
                yield from ((address, *row) for address, row in rows.items())
                rows.clear()
                last = -1
            elif line.lstrip().startswith("LOC"):
                columns = line.split()[2:]
            elif (row := _ROW.match(line)) and first <= int(row[1], 16) < last:
                values = dict(zip(columns, _TWICE.sub("", row[3]).split(), strict=False))
                rows[int(row[1], 16)] = row[2], values
        yield from ((address, *row) for address, row in rows.items())


def as_readelf(rule: NDArray[np.int64], machine: Machine = X86_64) -> tuple[str, dict[str, str]]:
    """A rule of ours, (columns,), in readelf's words."""
    kind, register = Cfa(rule[CFA] >> 8), int(rule[CFA] & 0xFF)
    cfa = f"{_NAMES[register]}{int(rule[CFA_OFFSET]):+d}" if kind is Cfa.REGISTER else "exp"
    if kind is Cfa.NONE:
        cfa = "none"
    saved = {}
    for nth, column in enumerate(machine.tracked):
        code = rule[FIRST_REGISTER + nth : FIRST_REGISTER + nth + 1]
        name = "ra" if column == machine.return_address else _NAMES[column]
        saved[name] = {
            Saved.SAME: "u",
            Saved.AT_CFA: f"c{int(offset_of(code)[0]):+d}",
            Saved.UNDEFINED: "u",
            Saved.AT_REGISTER: "exp",
            Saved.IS_CFA: f"v{int(offset_of(code)[0]):+d}",
            Saved.IN_REGISTER: f"r{register_of(code)[0]}",
            Saved.UNKNOWN: "exp",
        }[Saved(int(kind_of(code)[0]))]
    return cfa, saved


def differences(path: Path, rows: Rows, machine: Machine = X86_64) -> tuple[int, list[str]]:
    """How many rows readelf has of PATH, and those that are not ours."""
    told: dict[int, tuple[str, dict[str, str]]] = {}
    for address, cfa, saved in rows_of_readelf(path):
        told[address] = cfa, saved
    addresses = np.array(sorted(told), np.uint64)
    places = rows.rule[np.searchsorted(rows.start, addresses, "right") - 1]
    ours = [as_readelf(rule, machine) for rule in rows.rules]
    wrong = []
    for address, place in zip(addresses.tolist(), places.tolist(), strict=True):
        cfa, saved = told[address]
        our_cfa, our_saved = ours[place]
        expected = {name: saved.get(name, "u").replace("s", "u") for name in our_saved}
        if cfa != our_cfa:
            wrong.append(f"{address:#x}: CFA {cfa}, ours {our_cfa}")
        elif expected != our_saved:
            wrong.append(f"{address:#x}: {expected}, ours {our_saved}")
    return len(told), wrong
