"""Batches of a collector's own rows, as an agent sends them, kept in files: what simulated agents
replay."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks import many
from benchmarks.bench import Bench
from benchmarks.colony_intake import as_sent

TABLE: Final = "syscall_stats"
_INTERVALS: Final = 10
"""Rows that repeat sooner would pack better than rows do."""


def recorded(bench: Bench, recording: Path | None = None) -> Path:
    """A directory for `tests.simulated`, with batches of system calls of a program that makes 80
    different ones in 128 processes: RECORDING, which is made where it is not there yet."""
    recording = recording or bench.directory / "recording"
    into = recording / TABLE
    if not into.exists():
        with many.calls(bench) as program:
            drained = program.fill(_INTERVALS)
        into.mkdir(parents=True)
        for number, sent in enumerate(sent for each in drained for sent in as_sent(each)):
            (into / f"{number:04}").write_bytes(sent.wire)
    return recording
