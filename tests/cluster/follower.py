"""Follows the single requests of a pod until the stream ends, and prints what it has by then:

    python -P follower.py NAMESPACE/POD

A line of JSON for each batch, and one for the error. CORAL_AGENT and its like name the agent.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from typing import Final

from coral.client import AgentClient, AgentError, Retry

_RETRY: Final = Retry(patience_s=300.0, max_delay_s=0.5)


async def main(pod: str) -> None:
    """See the module."""
    async with AgentClient() as agent:
        started = await agent.start("http_latency", config={"pod": pod, "mode": "events"})
        async with agent.subscribe(started.collector_id, retry=_RETRY) as stream:
            try:
                async for _ in stream:
                    print(json.dumps(asdict(stream.account)), flush=True)
            except AgentError as error:
                told = {"error": type(error).__name__, "message": str(error)}
                print(json.dumps(asdict(stream.account) | told), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
