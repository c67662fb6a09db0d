"""How long it takes to unwind copied stacks, in batches, and to compile the tables for it.

The stacks are those of running programs at places where gdb stopped them; copies of 16 KB, as a
profile's. CPU time of one thread, so that a busy machine does not count.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Final

import numpy as np

from benchmarks.bench import Bench, BenchError
from benchmarks.report import Aim, Report, Samples
from coral.collectors.symbols.files import MappedFiles
from coral.collectors.symbols.maps import ProcessMaps
from coral.collectors.unwinding.rules import X86_64
from coral.collectors.unwinding.tables import Tables
from coral.collectors.unwinding.unwinder import Unwinder
from tests.stopped import seen_by_gdb

_STOPS: Final = 25
_ROUNDS: Final = 15
_BATCHES: Final = (99, 198, 990)
_STACK_BYTES: Final = 16 << 10
_MOST_COMPILE_S: Final = 0.3  # of Node's table
PYTHON: Final = """
import json
def deep(n): return deep(n - 1) if n else json.loads(json.dumps(list(range(50))))
print("ready", flush=True)
while True: sorted(range(20), key=lambda n: len(deep(n % 9)))
"""
NODE: Final = """
const zlib = require('zlib');
function work() {
  const text = JSON.stringify(Array.from({length: 500}, (_, i) => ({a: 'x' + i})));
  JSON.parse(text); zlib.gzipSync(text); setImmediate(work);
}
console.log('ready'); work();
"""


@dataclass
class _Measured:
    depth: float
    rows: int
    compile_s: list[float]
    us_a_stack: dict[int, list[float]]


async def measure(bench: Bench) -> Report:
    """The section."""
    if which("gdb") is None:
        raise BenchError("no gdb, which stops programs for the section `unwinding`")
    programs: dict[str, Sequence[str | Path]] = {
        "C without frame pointers": [bench.program("unwound"), "2"],
        "CPython": ["/usr/bin/python3", "-P", "-c", PYTHON],
    }
    if node := which("node"):
        programs["Node"] = [node, "-e", NODE]
    measured = {}
    for name, command in programs.items():
        measured[name] = _measure(command)
        bench.say(f"{name}: {_ROUNDS} rounds of {len(_BATCHES)} batches")
    samples = {
        f"{name}, {batch} at once, us": of.us_a_stack[batch]
        for name, of in measured.items()
        for batch in _BATCHES
    }
    rows = [
        [
            name,
            f"{of.depth:.1f}",
            *(Samples(of.us_a_stack[batch]).show(1) for batch in _BATCHES),
            f"{of.rows:,}",
            Samples(of.compile_s).show(2),
        ]
        for name, of in measured.items()
    ]
    aims = []
    if "Node" in measured:
        value = Samples(measured["Node"].compile_s).median
        aims.append(Aim("Node's unwind tables from cold", value, _MOST_COMPILE_S, " s"))
    return Report(
        title="Unwinding of copied stacks",
        how=f"CPU time a stack, in microseconds; {_ROUNDS} rounds, median (middle half)",
        columns=["", "frames", *(f"{batch} at once" for batch in _BATCHES), "rows", "compiled, s"],
        rows=rows,
        aims=aims,
        samples=samples,
    )


def _measure(command: Sequence[str | Path]) -> _Measured:
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        files = MappedFiles()
        try:
            if process.stdout is None or process.stdout.readline() != b"ready\n":
                raise BenchError(f"{command[0]} does not start")
            seen = seen_by_gdb(process.pid, _STOPS, stack_bytes=_STACK_BYTES).samples
            maps = ProcessMaps(process.pid, files)
            compile_s = []
            for _ in range(_ROUNDS // 3):
                unwinder = Unwinder(X86_64, tables := Tables())
                begun = time.process_time()
                which_one = np.zeros(len(seen), np.int64)
                now = np.full(len(seen), np.iinfo(np.uint64).max)
                stacks = unwinder.unwind([maps], which_one, now, seen)
                compile_s.append(time.process_time() - begun)
            us_a_stack: dict[int, list[float]] = {batch: [] for batch in _BATCHES}
            for _ in range(_ROUNDS):
                for batch in _BATCHES:
                    some = seen.take(np.arange(batch) % len(seen))
                    begun = time.process_time()
                    unwinder.unwind(
                        [maps], which_one[:1].repeat(batch), now[:1].repeat(batch), some
                    )
                    us_a_stack[batch].append((time.process_time() - begun) / batch * 1e6)
            return _Measured(float(stacks.lengths.mean()), tables.rows, compile_s, us_a_stack)
        finally:
            files.close()
            process.kill()
