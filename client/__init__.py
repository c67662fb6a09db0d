"""The Python client of the contract: connect, start, subscribe, stop.

It shares the generated messages with the agent, and nothing else.
"""

from coral.client.batch import Batch
from coral.client.client import DEFAULT_ADDRESS, AgentClient, AgentError, default_address
from coral.wire.histogram import Buckets, Histogram

__all__ = [
    "DEFAULT_ADDRESS",
    "AgentClient",
    "AgentError",
    "Batch",
    "Buckets",
    "Histogram",
    "default_address",
]
