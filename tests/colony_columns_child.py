"""A process whose store has the failures of a peer by the given names, one each: `python -P -m
tests.colony_columns_child DIRECTORY SESSION END_NS NAME...`. It says when they are durable, and
waits to be killed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from coral.client import Batch
from coral.colony.delivery import Delivery
from coral.colony.store import Settings, Store
from coral.colony.tables import ContractRows
from tests.deliveries import delivered, message_of, wire_of
from tests.summaries import peers


def failing(session: str, end_ns: int, *names: str) -> Delivery:
    """A delivery of one peer in the interval until END_NS, with one failure by each name."""
    message = message_of(wire_of(peers(1, 1, 0), end_ns))
    columns, first = message.tcp_peers_columns, len(message.strings)
    message.strings.extend(names)
    columns.failure_names[:] = range(first, first + len(names))
    columns.failures[:] = [1] * len(names)
    return delivered(Batch.parse(message.SerializeToString()), collector_id=session)


async def main(directory: Path, session: str, end_ns: str, *names: str) -> None:
    """Until killed."""
    store = Store(directory, Settings(commit_s=0.02), ContractRows())
    await store.start()
    store.put(failing(session, int(end_ns), *names))
    await store.stored()
    print("stored", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
