"""A subscriber in a process of its own: reads a collector's stream to its end and says what it got.

    python -P -m tests.reader ADDRESS COLLECTOR_ID [--after N] [--overflow POLICY] [--until N]

Prints `subscribed`, then, when it is done, one line of JSON: rows, losses by stage, the last
number, how many numbers nothing explained, and how the session ended. With --until it leaves,
without a word to the agent, after the batch that has event number N.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections import Counter

from coral.client import AgentClient, AgentError
from coral.mesh.v1 import ebpf_pb2 as pb


async def read(arguments: argparse.Namespace) -> None:
    rows = 0
    last = int(arguments.after)
    lost: Counter[str] = Counter()
    untold = 0  # numbers between two batches that no loss has explained
    end = error = None
    terms = pb.EbpfEventStreamRequest(
        after_seq=last, overflow=arguments.overflow, queue_bytes=arguments.queue_bytes
    )

    def say() -> None:
        told = {"rows": rows, "lost": lost, "last": last, "untold": untold, "end": end}
        print(json.dumps({**told, "error": error}), flush=True)

    async with AgentClient(arguments.address) as agent:
        try:
            async with agent.subscribe(arguments.collector_id, terms) as stream:
                print("subscribed", flush=True)
                async for batch in stream:
                    lost.update(batch.lost)
                    untold -= sum(n for stage, n in batch.lost.items() if stage != "kernel_buffer")
                    if batch.last_seq >= batch.first_seq:
                        untold += batch.first_seq - last - 1
                        last = batch.last_seq
                        rows += len(batch.events)
                    if batch.end:
                        end = pb.SessionEnd.Reason.Name(batch.end.reason)
                        untold += batch.end.produced - last
                    if arguments.until and last >= arguments.until:
                        say()
                        os._exit(0)
        except AgentError as refused:
            error = str(refused)
    say()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("collector_id")
    parser.add_argument("--after", type=int, default=0)
    parser.add_argument("--until", type=int, default=0)
    parser.add_argument("--queue-bytes", type=int, default=0)
    parser.add_argument("--overflow", default="OVERFLOW_DROP_OLDEST")
    asyncio.run(read(parser.parse_args()))


if __name__ == "__main__":
    main()
