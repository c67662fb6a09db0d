"""Where the work of a profile is done: the event loop serves others meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coral.collectors.contract import Batch
from coral.collectors.cpu_profile import collector as of_kind
from coral.collectors.cpu_profile.intake import Intake
from coral.collectors.runner import Stop, run
from coral.collectors.symbols.kernel import KernelSymbols
from coral.collectors.symbols.names import Symbolizer
from coral.collectors.symbols.store import SymbolStore
from coral.collectors.unwinding import tables
from coral.collectors.unwinding.unwinder import Unwinder
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.profiling import Profile, collector_of, waiting

pytestmark = pytest.mark.usefixtures("nothing_left")

# What takes long: reading the ring, unwinding, compiling tables, reading symbols, naming, and
# making rows.
WORK = [
    (Intake, "take"),
    (Unwinder, "unwind"),
    (tables, "compiled"),
    (KernelSymbols, "prepare"),
    (SymbolStore, "get"),
    (Symbolizer, "names"),
    (of_kind, "summaries"),
]


def test_nothing_that_takes_long_is_done_on_the_event_loop(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = defaultdict[str, set[int]](set)
    for owner, name in WORK:
        monkeypatch.setattr(owner, name, _noting(getattr(owner, name), threads[name]))
    process = waiting(programs / "profiled", "shares", 1000)
    profile, stop = Profile(), Stop()

    def emit(batch: Batch) -> None:
        profile.add(batch)
        if profile.by("unwinding")[pb.CPU_UNWINDING_EH_FRAME]:
            stop.request()

    def begin() -> None:
        assert process.stdin
        process.stdin.write("x")
        process.stdin.flush()

    with process:
        collector = collector_of({"pid": str(process.pid), "interval": "100ms"})
        asyncio.run(asyncio.wait_for(run(collector, emit, begin, stop), 60))
        process.kill()
    assert set(threads) == {name for _, name in WORK}
    for name, where in threads.items():
        assert where, name
        assert threading.get_ident() not in where, name


def _noting(function: Callable[..., Any], threads: set[int]) -> Callable[..., Any]:
    """FUNCTION, which adds the thread that it runs in to THREADS."""

    def noting(*arguments: Any, **named: Any) -> Any:
        threads.add(threading.get_ident())
        return function(*arguments, **named)

    return noting
