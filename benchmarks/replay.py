"""What a process holds for 4 MiB of a stream's replay that is full of summaries.

    python -P -m benchmarks.replay BATCHES_FILE WAY

Prints how many rows are held, and by how many bytes the process has grown, as JSON. BATCHES_FILE
has the intervals of a collector, pickled.
"""

from __future__ import annotations

import gc
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from google.protobuf.message import Message

from benchmarks import many
from benchmarks.bench import ROOT, Bench
from benchmarks.memory import rss_mb
from benchmarks.report import Report, times
from coral.agent.streams import Channel, Terms
from coral.bpf.libbpf import release_memory
from coral.collectors.contract import Batch, Summaries
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import field_of

_REPLAY_BYTES: Final = 4 << 20
_WARM_BYTES: Final = 64 << 10
_INTERVALS: Final = 8
_AS_MESSAGES: Final = "rows as messages, and their encoding"


async def measure(bench: Bench) -> Report:
    """The section: a process for each way and type."""
    rows: list[tuple[str, ...]] = []
    samples: dict[str, list[float]] = {}
    for name, workload in many.WORKLOADS.items():
        path = bench.directory / "batches"
        with workload(bench) as program:
            path.write_bytes(pickle.dumps(program.fill(_INTERVALS)))
        found = {way: _run(path, way) for way in _WAYS}
        _, before_mb = found[_AS_MESSAGES]
        for way, (count, mb) in found.items():
            samples[f"{name}, {way}, MB"] = [mb]
            bytes_a_row = f"{mb * 1e6 / count:,.0f}"
            rows.append(
                (f"{name}: {way}", f"{count:,}", f"{mb:.1f}", bytes_a_row, times(mb, before_mb))
            )
        bench.say(f"{name}: done")
    return Report(
        title="Memory of 4 MiB of replay that holds summaries",
        how="Growth of VmRSS of a process that does nothing else, in MB of 10^6 bytes. Messages "
        "are counted by their encoded size, as the agent once did; columns by what they take.",
        columns=("", "rows kept", "MB", "bytes a row", "of messages'"),
        rows=rows,
        samples=samples,
    )


def _run(path: Path, way: str) -> tuple[int, float]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "benchmarks.replay", str(path), way],
        cwd=ROOT, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    return told["rows"], told["mb"]


def _as_messages(batches: Sequence[Summaries], size_bytes: int) -> tuple[int, object]:
    kept: list[Message] = []
    encoded = bytearray()
    for rows in batches:
        field = field_of(rows.message.DESCRIPTOR).same_as
        for message in rows.as_messages():
            batch = pb.EbpfEventBatch()
            getattr(batch, field).append(message)
            wire = batch.SerializeToString()
            if len(encoded) + len(wire) > size_bytes:
                return len(kept), (kept, encoded)
            encoded += wire
            kept.append(message)
    raise AssertionError("the batches do not fill the replay")


def _as_columns(*readers: Terms) -> Callable[[Sequence[Summaries], int], tuple[int, object]]:
    """The agent's stream, with READERS that keep up."""

    def hold(batches: Sequence[Summaries], size_bytes: int) -> tuple[int, object]:
        channel = Channel(many.header_of(batches[0]), size_bytes)
        subscriptions = [channel.subscribe(terms) for terms in readers]
        for rows in batches:
            channel.publish(Batch(rows, 1, 2))
            for subscription in subscriptions:
                while frame := subscription.take():
                    subscription.message(frame)
            if channel.kept_from:  # it is full
                break
        return sum(frame.count for frame in channel.kept), (channel, subscriptions)

    return hold


_WAYS: Final = {
    _AS_MESSAGES: _as_messages,
    "columns, no subscriber": _as_columns(),
    "columns, a subscriber of columns": _as_columns(Terms(columns=True)),
    "columns, a subscriber of rows": _as_columns(Terms()),
}


def _main(path: Path, way: str) -> None:
    hold = _WAYS[way]
    hold(pickle.loads(path.read_bytes()), _WARM_BYTES)
    before_mb = _settled_mb()
    count, held = hold(pickle.loads(path.read_bytes()), _REPLAY_BYTES)
    grown_mb = _settled_mb() - before_mb
    assert held
    print(json.dumps({"rows": count, "mb": grown_mb}))


def _settled_mb() -> float:
    gc.collect()
    release_memory()
    return rss_mb("self")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2])
