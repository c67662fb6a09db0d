"""One side of the bus, to be killed: `follow URL SEED AGENTS EVENTS PACE` publishes the scripted
sessions of some agents, and ends once the stream has them; `store URL PATH` reads them into
PATH."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from coral.colony.bus.consumer import Consumer
from coral.colony.bus.publisher import Publisher
from tests.bus import Scripted, Shelf, settings_for

FATES = ("", "", "", "", "", "", "rate_limit", "subscriber_queue")


def sessions(seed: int, agents: int, events: int) -> list[Scripted]:
    """Two sessions of each agent, of about so many events, the same for the same SEED."""
    chance = random.Random(seed)
    return [
        Scripted.make(
            f"node-{agent}.example", f"session-{at}",
            chance.choices(FATES, k=events + chance.randrange(50)), chance.randint(3, 12),
        )
        for agent in range(agents)
        for at in range(2)
    ]  # fmt: skip


async def follow(url: str, seed: int, agents: int, events: int, pace_s: float) -> None:
    async with Publisher(settings_for(url)) as publisher:

        async def one(scripted: Scripted) -> None:
            standing = publisher.standing(*scripted.session.key)
            if standing and standing.ended:
                return
            for delivery in scripted.deliveries(standing.last_seq if standing else 0):
                publisher.put(delivery)
                await publisher.room()
                await asyncio.sleep(pace_s)

        await asyncio.gather(*map(one, sessions(seed, agents, events)))
        await publisher.stored()


def main() -> None:
    role, url, *rest = sys.argv[1:]
    if role == "follow":
        seed, agents, events, pace_s = rest
        asyncio.run(follow(url, int(seed), int(agents), int(events), float(pace_s)))
    else:
        asyncio.run(Consumer(settings_for(url, ack_wait_s=2.0), Shelf(Path(rest[0]))).run())


if __name__ == "__main__":
    main()
