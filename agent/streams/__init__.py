"""Streams: batches are numbered, encoded once, filtered, queued and accounted for."""

from coral.agent.streams.channel import MAX_ROWS, MAX_SUMMARIES, Channel, shorten_queues
from coral.agent.streams.filter import EVERYTHING, Filter
from coral.agent.streams.frame import Frame, Header
from coral.agent.streams.readers import Readers
from coral.agent.streams.subscription import (
    Account,
    Subscription,
    SubscriptionEndedError,
    Terms,
)

__all__ = [
    "EVERYTHING",
    "MAX_ROWS",
    "MAX_SUMMARIES",
    "Account",
    "Channel",
    "Filter",
    "Frame",
    "Header",
    "Readers",
    "Subscription",
    "SubscriptionEndedError",
    "Terms",
    "shorten_queues",
]
