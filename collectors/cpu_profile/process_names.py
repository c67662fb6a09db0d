"""The command names of processes at the time of their samples: one that has executed another
program since has another name now."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from coral.collectors.columns import group
from coral.collectors.cpu_profile.frames import mixed


def process_names(structs: NDArray[Any], names_now: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
    """The command names of the processes of n samples, STRUCTS of struct cpu_sample in the order of
    their times, by the program that each process was; of shape (n,).

    A process has the name of its first thread. Where that was not sampled, it is NAMES_NOW, of
    shape (n,), for the newest program, and for those before that of the sampled thread.
    """
    first, of_program = group(mixed(structs["tgid"], structs["born"], structs["execs"]))
    found = np.zeros(len(first), structs["comm"].dtype)
    _, of_process = group(mixed(structs["tgid"][first], structs["born"][first]))
    execs = structs["execs"][first]
    newest = np.zeros(len(first), execs.dtype)
    np.maximum.at(newest, of_process, execs)
    is_newest = execs == newest[of_process]
    found[is_newest] = names_now[first[is_newest]]
    leaders = np.flatnonzero(structs["tid"] == structs["tgid"])
    found[of_program[leaders]] = structs["comm"][leaders]  # the last of each counts
    names: NDArray[np.bytes_] = found[of_program]
    return np.where(names != b"", names, structs["comm"])
