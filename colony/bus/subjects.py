"""The subjects of the stream: one a session, below its agent, below one of 64 buckets of agents.

    coral.batches.07.node-3%2Eexample.0f3a91
    coral.agents.07.node-3%2Eexample

Colonies share the agents by bucket, so that a share is a filter that the server applies.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import quote
from zlib import crc32

BUCKETS: Final = 64
BATCHES: Final = "batches"
AGENTS: Final = "agents"

_EMPTY: Final = "%"


def token(text: str) -> str:
    """TEXT as one token of a subject: what means something there, or is not ASCII, is escaped as in
    URLs."""
    return quote(text, safe="").replace(".", "%2E").replace("~", "%7E") or _EMPTY


def bucket(agent_id: str) -> int:
    """The bucket of an agent, by CRC-32 of its id in UTF-8: the same for every colony, for ever."""
    return crc32(agent_id.encode()) % BUCKETS


def of_session(prefix: str, agent_id: str, collector_id: str) -> str:
    """The subject of a session's deliveries."""
    return f"{prefix}.{BATCHES}.{bucket(agent_id):02}.{token(agent_id)}.{token(collector_id)}"


def of_agent(prefix: str, agent_id: str) -> str:
    """The subject of what there is to say about an agent itself."""
    return f"{prefix}.{AGENTS}.{bucket(agent_id):02}.{token(agent_id)}"


def everything(prefix: str) -> str:
    """The filter for all subjects of the stream."""
    return f"{prefix}.>"


def batches(prefix: str) -> str:
    """The filter for those of all sessions."""
    return f"{prefix}.{BATCHES}.>"


def share(prefix: str, shard: int, shards: int) -> list[str]:
    """The filters for the agents of colony number SHARD of SHARDS. Raises ValueError."""
    if not 0 <= shard < shards <= BUCKETS:
        raise ValueError(f"shard {shard} of {shards}: there are 1 to {BUCKETS}, from 0")
    if shards == 1:
        return [everything(prefix)]
    return [f"{prefix}.*.{at:02}.>" for at in range(shard, BUCKETS, shards)]
