"""Subscribers in a process of their own, for the bench: COUNT of one session, each on its own
connection.

    python -P -m benchmarks.subscriber ADDRESS COLLECTOR_ID COUNT [rows|columns|filters]

The last argument says in which form summaries come; `filters` gives each subscriber of single
events a filter of its own, which lets nearly all of them pass. Prints `subscribed` when all are,
and at the session's end one line of JSON: the sums over them all.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coral.client import AgentClient, Batch, Stream, Terms


@dataclass
class Got:
    """What came, over all subscribers of this process."""

    rows: int = 0
    batches: int = 0
    wire_bytes: int = 0
    last_at_s: float = 0.0  # time.monotonic(), which all processes of a machine share
    lost: Counter[str] = field(default_factory=Counter)
    latencies_ns: list[NDArray[np.int64]] = field(default_factory=list)

    def take(self, batch: Batch) -> None:
        """Counts one message."""
        arrived_ns = time.time_ns()
        self.rows += batch.count
        self.batches += 1
        if len(batch.events):
            self.last_at_s = time.monotonic()
            self.latencies_ns.append(arrived_ns - batch.events["ended_ns"])

    def finish(self, stream: Stream) -> None:
        """Adds what a stream knows at its end."""
        self.wire_bytes += stream.received_bytes
        self.lost.update(stream.account.lost)
        self.lost.update(stream.account.lost_in_kernel)

    def percentiles_us(self) -> dict[str, float]:
        """The time from the end of a call to the arrival of its row, in percentiles."""
        if not self.latencies_ns:
            return {}
        p50, p99 = np.percentile(np.concatenate(self.latencies_ns), (50, 99))
        return {"p50_us": p50 / 1e3, "p99_us": p99 / 1e3}


async def _subscribe(
    address: str, collector_id: str, terms: Terms, ready: asyncio.Event, got: Got
) -> None:
    async with (
        AgentClient(address) as agent,
        agent.subscribe(collector_id, **terms) as stream,
    ):
        ready.set()
        async for batch in stream:
            got.take(batch)
        got.finish(stream)


async def _main(address: str, collector_id: str, count: int, form: str = "rows") -> None:
    got = Got()
    async with asyncio.TaskGroup() as group:
        readies = [asyncio.Event() for _ in range(count)]
        for number, ready in enumerate(readies):
            terms: Terms = {"columns": form == "columns"}
            if form == "filters":
                terms["min_duration_s"] = (number + 1) / 1e9
            group.create_task(_subscribe(address, collector_id, terms, ready, got))
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
    asyncio.run(_main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:]))
