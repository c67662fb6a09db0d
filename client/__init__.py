"""The Python client of the contract: connect, start, subscribe, stop.

It shares the generated messages with the agent, and nothing else.
"""

from client.batch import Batch
from client.client import DEFAULT_ADDRESS, AgentClient, AgentError, default_address
from client.histogram import Buckets, Histogram

__all__ = [
    "DEFAULT_ADDRESS",
    "AgentClient",
    "AgentError",
    "Batch",
    "Buckets",
    "Histogram",
    "default_address",
]
