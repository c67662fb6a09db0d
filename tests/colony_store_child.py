"""A process whose store is written to until the process is killed: `python -P -m
tests.colony_store_child DIRECTORY`. It prints what it knows to be durable: agent, number."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from pathlib import Path

from coral.colony.store import Settings, Store
from tests.colony_store import BEGIN_NS, SECOND_NS, PlainRows, Sender

_SINCE_NS = 1_790_000_000 * SECOND_NS


def clock_ns() -> int:
    """One that does a minute in a second, so that minutes and hours end meanwhile."""
    return BEGIN_NS + (time.time_ns() - _SINCE_NS) * 60


def settings() -> Settings:
    """Everything happens all the time."""
    return Settings(commit_s=0.01, seal_rows=500, lateness_s=10.0, linger_s=0.2, clock_ns=clock_ns)


async def main(directory: Path) -> None:
    """Until killed."""
    store = Store(directory, settings(), PlainRows())
    await store.start()
    senders = [Sender(it) for it in "abc"]
    for it in senders:
        it.last_seq = store.expected_seq(*it.session.key)
    print("open", flush=True)
    while True:
        for sender in senders:
            late_ns = random.choice([0, 0, 0, 30, 300]) * SECOND_NS
            lost = random.choice([{}, {}, {"map_full": random.randrange(1, 5)}])
            # A transaction with a whole row group does not go through DuckDB's log.
            count = 20_000 if random.random() < 0.03 else random.randrange(60)
            store.put(sender.next(count, clock_ns() - late_ns, lost=lost))
        await (store.stored() if random.random() < 0.3 else asyncio.sleep(0.005))
        for standing in store.standings():
            print(standing.session.agent_id, standing.last_seq, flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
