"""A subscriber in a process of its own: reads a stream to its end and reports what it got.

    python -P -m tests.reader ADDRESS COLLECTOR_ID [--after N] [--overflow POLICY] [--until N]

Prints `subscribed`, then, at the end, one line of JSON: rows, losses by stage, the last number, how
many numbers nothing explains, and how the session ended. With --until it exits, without closing the
connection, after the batch that has event number N.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os

from coral.client import Account, AgentClient, AgentError
from coral.mesh.v1 import ebpf_pb2 as pb


async def read(arguments: argparse.Namespace) -> None:
    rows = 0
    account = Account(arguments.after, arguments.after, 0, 0, 0)
    end = error = None
    terms = pb.EbpfEventStreamRequest(
        after_seq=arguments.after, overflow=arguments.overflow, queue_bytes=arguments.queue_bytes
    )

    def report() -> None:
        explained = rows + account.filtered + sum(account.lost.values())
        unexplained = account.last_seq - account.after_seq - explained
        if end:
            unexplained += end.produced - account.last_seq
        told = {
            "rows": rows,
            "lost": {**account.lost, **account.lost_in_kernel},
            "last": account.last_seq,
            "untold": unexplained,
            "end": pb.SessionEnd.Reason.Name(end.reason) if end else None,
            "error": error,
        }
        print(json.dumps(told), flush=True)

    async with AgentClient(arguments.address) as agent:
        try:
            async with agent.subscribe(arguments.collector_id, terms) as stream:
                print("subscribed", flush=True)
                async for batch in stream:
                    rows += len(batch.events)
                    account, end = stream.account, batch.end
                    if arguments.until and account.last_seq >= arguments.until:
                        report()
                        os._exit(0)
        except AgentError as refused:
            error = str(refused)
    report()


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
