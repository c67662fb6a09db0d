"""Programs that do nothing, on the hooks of a collector: whatever the collector costs beyond these
is its own doing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from benchmarks.bench import Bench, compile_bpf
from coral.bpf import BpfObject


class Empty(Enum):
    """By where they run: the source, NAME.bpf.c, and its programs."""

    AT_CALLS = "empty", "coral_empty_enter", "coral_empty_exit"
    AT_CONNECTIONS = "tcp_empty", "coral_empty_state", "coral_empty_destroy", "coral_empty_segment"
    AT_SOCKETS = "http_empty", "coral_empty_send", "coral_empty_receive"


@contextmanager
def attached(bench: Bench, empty: Empty) -> Iterator[None]:
    """They are attached for the duration of the block."""
    name, *programs = empty.value
    path = bench.directory / f"{name}.bpf.o"
    if not path.exists():
        compile_bpf(bench.directory, name)
    with BpfObject(path, programs=programs) as bpf_object:
        bpf_object.attach()
        yield
