"""Subscribers in a process of their own, for the bench: N of one session, each on a connection of
its own.

    python -P -m benchmarks.subscriber ADDRESS COLLECTOR_ID COUNT

Prints `subscribed` when all are; at the session's end one line of JSON, the sums over them all.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import numpy as np
from numpy.typing import NDArray

from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb

_METHOD: Final = "/coral.mesh.v1.EbpfService/StreamEventBatches"
# Or all channels of a process to one address would be one connection.
_OPTIONS: Final = (("grpc.use_local_subchannel_pool", 1),)


@dataclass
class Got:
    """What came, over all subscribers of this process."""

    rows: int = 0
    batches: int = 0
    wire_bytes: int = 0
    last_at_s: float = 0.0  # time.monotonic(), which all processes of a machine share
    lost: Counter[str] = field(default_factory=Counter)
    latencies_ns: list[NDArray[np.int64]] = field(default_factory=list)

    def take(self, wire: bytes) -> None:
        """Counts one message."""
        arrived_ns = time.time_ns()
        batch = Batch.parse(wire)
        self.rows += len(batch.events)
        self.batches += 1
        self.wire_bytes += len(wire)
        self.lost.update(batch.lost)
        if len(batch.events):
            self.last_at_s = time.monotonic()
            self.latencies_ns.append(arrived_ns - batch.events["ended_ns"])

    def percentiles_us(self) -> dict[str, float]:
        """From the end of a call to its row's arrival here."""
        if not self.latencies_ns:
            return {}
        p50, p99 = np.percentile(np.concatenate(self.latencies_ns), (50, 99))
        return {"p50_us": p50 / 1e3, "p99_us": p99 / 1e3}


async def _subscribe(address: str, collector_id: str, ready: asyncio.Event, got: Got) -> None:
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        method: Any = channel.unary_stream(
            _METHOD,
            request_serializer=pb.EbpfEventStreamRequest.SerializeToString,
            response_deserializer=None,
        )
        call = method(pb.EbpfEventStreamRequest(collector_id=collector_id))
        await call.initial_metadata()
        ready.set()
        async for wire in call:
            got.take(wire)


async def _main(address: str, collector_id: str, count: int) -> None:
    got = Got()
    async with asyncio.TaskGroup() as group:
        readies = [asyncio.Event() for _ in range(count)]
        for ready in readies:
            group.create_task(_subscribe(address, collector_id, ready, got))
        for ready in readies:
            await ready.wait()
        print("subscribed", flush=True)
        began_s = time.process_time()
    told = {
        "cpu_s": time.process_time() - began_s,
        "rows": got.rows,
        "batches": got.batches,
        "wire_bytes": got.wire_bytes,
        "last_at_s": got.last_at_s,
        "lost": got.lost,
    }
    print(json.dumps({**told, **got.percentiles_us()}), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
