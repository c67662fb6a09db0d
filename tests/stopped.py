"""Stacks of processes as gdb sees them, and ours of the same registers and memory."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from coral.collectors.symbols.files import MappedFiles
from coral.collectors.symbols.maps import ProcessMaps
from coral.collectors.unwinding.rules import X86_64
from coral.collectors.unwinding.stacks import End, Frame, Samples, Stacks
from coral.collectors.unwinding.tables import Tables
from coral.collectors.unwinding.unwinder import Unwinder
from tests.support import ROOT

SCRIPT = ROOT / "tests/programs/gdb_stacks.py"


@dataclass(frozen=True)
class Seen:
    """The threads of a process at several stops."""

    samples: Samples
    frames: list[list[int]]  # of each: addresses as gdb has them, innermost first
    signals: list[list[int]]  # of each: indexes of frames of signal handlers' returns


@dataclass
class Compared:
    """How many of our stacks are those of gdb, frame by frame, and which are not."""

    equal: int = 0
    cut: int = 0  # equal as far as the copy of the stack reached, and marked
    guessed: int = 0  # equal up to a frame that was guessed, and marked: gdb guesses there, too
    wrong: list[str] = field(default_factory=list)


def seen_by_gdb(pid: int, rounds: int, *, stack_bytes: int = 65536, timeout_s: float = 60) -> Seen:
    """The threads of PID, in ROUNDS places where gdb stops them, with STACK_BYTES of each stack."""
    with tempfile.TemporaryDirectory() as directory:
        output, log = Path(directory) / "stacks", Path(directory) / "log"
        command = ["gdb", "-nx", "-batch", "-iex", "set debuginfod enabled off", "-p", str(pid)]
        environment = os.environ | {
            "CORAL_STACKS_PID": str(pid),
            "CORAL_STACKS_ROUNDS": str(rounds),
            "CORAL_STACKS_OUTPUT": str(output),
            "CORAL_STACKS_BYTES": str(stack_bytes),
        }
        with (
            log.open("w") as told,
            subprocess.Popen(
                [*command, "-x", str(SCRIPT)], stdout=told, stderr=told, env=environment
            ) as gdb,
        ):
            # gdb waits for whatever it starts, so the signals come from here. The process ignores
            # them when gdb has gone.
            end = time.monotonic() + timeout_s
            while gdb.poll() is None and time.monotonic() < end:
                time.sleep(random.uniform(0.005, 0.03))
                os.kill(pid, signal.SIGWINCH)
            gdb.kill()
        assert output.exists(), log.read_text()
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert lines, log.read_text()
    copies = [np.frombuffer(bytes.fromhex(line[2]), np.uint64) for line in lines]
    count = np.array([len(copy) for copy in copies], np.int64)
    samples = Samples(
        np.zeros(len(lines), np.int64),
        np.array([line[0] for line in lines], np.uint64),
        np.concatenate(copies),
        np.cumsum(count) - count,
        count,
        np.array([line[1] for line in lines], np.uint64),
    )
    frames = [[address for address, _ in line[3]] for line in lines]
    signals = [[n for n, (_, is_signal) in enumerate(line[3]) if is_signal] for line in lines]
    return Seen(samples, frames, signals)


def unwound(pid: int, samples: Samples, tables: Tables | None = None) -> Stacks:
    """Our stacks of SAMPLES of one process."""
    files = MappedFiles()
    try:
        process = ProcessMaps(pid, files)
        which = np.zeros(len(samples), np.int64)
        times = np.full(len(samples), np.iinfo(np.uint64).max)
        return Unwinder(X86_64, tables).unwind([process], which, times, samples)
    finally:
        files.close()


def compare(seen: Seen, stacks: Stacks) -> Compared:
    """Our STACKS and those SEEN by gdb."""
    compared = Compared()
    offsets = stacks.offsets
    for n, frames in enumerate(seen.frames):
        ours = stacks.addresses[offsets[n] : offsets[n + 1]].tolist()
        flags = stacks.flags[offsets[n] : offsets[n + 1]]
        signals = np.flatnonzero(flags & Frame.SIGNAL).tolist()
        guesses = np.flatnonzero(flags & Frame.GUESS).tolist()
        if ours == frames and signals == seen.signals[n]:
            compared.equal += 1
        elif stacks.ends[n] == End.COPY_TOO_SHORT and ours == frames[: len(ours)]:
            compared.cut += 1
        elif guesses and ours[: guesses[0]] == frames[: guesses[0]]:
            compared.guessed += 1
        else:
            pairs = enumerate(zip(ours, frames, strict=False))
            first = next((i for i, (mine, theirs) in pairs if mine != theirs), None)
            compared.wrong.append(
                f"stack {n}: {len(ours)} frames, gdb {len(frames)}; first other: {first}; "
                f"end {stacks.ends[n]}; unmapped {stacks.unmapped[n]:#x}"
            )
    return compared
