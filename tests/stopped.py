"""Stacks of processes as gdb sees them, and ours of the same registers and memory."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coral.collectors.symbols.files import MappedFiles
from coral.collectors.symbols.maps import ProcessMaps
from coral.collectors.unwinding.rules import X86_64
from coral.collectors.unwinding.stacks import End, Frame, Samples, Stacks
from coral.collectors.unwinding.tables import Tables
from coral.collectors.unwinding.unwinder import Unwinder

SCRIPT = Path(__file__).with_name("gdb_stacks.py")


@dataclass(frozen=True)
class Seen:
    """The threads of a process at several stops."""

    samples: Samples
    frames: list[list[int]]  # of each: addresses as gdb has them, innermost first
    signals: list[list[int]]  # of each: indexes of frames of signal handlers' returns


def seen_by_gdb(pid: int, rounds: int, timeout_s: float = 60) -> Seen:
    """Stops PID in ROUNDS places, with gdb."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "stacks"
        command = [
            "gdb", "-nx", "-batch",
            "-iex", "set debuginfod enabled off", "-iex", "set auto-load off",
            "-p", str(pid),
            "-ex", f"python pid, rounds, output = {pid}, {rounds}, {str(output)!r}",
            "-x", SCRIPT,
        ]  # fmt: skip
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as gdb:
            # What gdb starts, gdb waits for, so the signals come from here; the process ignores them
            # once gdb has gone.
            try:
                end = time.monotonic() + timeout_s
                while gdb.poll() is None and time.monotonic() < end:
                    time.sleep(random.uniform(0.005, 0.03))
                    os.kill(pid, signal.SIGWINCH)
            finally:
                gdb.kill()
            told = gdb.stdout.read() if gdb.stdout else ""
        assert output.exists(), told
        lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines, told
    copies = [np.frombuffer(bytes.fromhex(line[3]), np.uint64) for line in lines]
    count = np.array([len(copy) for copy in copies], np.int64)
    samples = Samples(
        np.zeros(len(lines), np.int64),
        np.array([line[1] for line in lines], np.uint64),
        np.concatenate(copies),
        np.cumsum(count) - count,
        count,
        np.array([line[2] for line in lines], np.uint64),
    )
    frames = [[address for address, _ in line[4]] for line in lines]
    signals = [[n for n, (_, signal) in enumerate(line[4]) if signal] for line in lines]
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


@dataclass
class Compared:
    """How many of our stacks are those of gdb, frame by frame, and which are not."""

    equal: int
    cut: int  # equal as far as the copy of the stack reached
    guessed: int  # equal up to a frame that was guessed, as marked
    wrong: list[str]


def compare(seen: Seen, stacks: Stacks) -> Compared:
    """Our STACKS and those SEEN by gdb."""
    offsets = stacks.offsets
    compared = Compared(0, 0, 0, [])
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
            equal = next((i for i, (a, b) in enumerate(zip(ours, frames)) if a != b), None)
            compared.wrong.append(
                f"stack {n}: {len(ours)} frames, gdb {len(frames)}; first other: {equal}; "
                f"end {stacks.ends[n]}; unmapped {stacks.unmapped[n]:#x}"
            )
    return compared
