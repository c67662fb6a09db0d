"""The keys `limits.…` of the configuration."""

from __future__ import annotations

import os
from typing import Annotated

from msgspec import Meta, Struct, field

from coral.agent.config_units import ByteCount, Duration
from coral.wire.leases import MAX_LEASE_S

Positive = Annotated[int, Meta(ge=1, le=1_000_000)]


def _for_each_cpu(percent: float) -> float:
    return percent * (os.cpu_count() or 1)


class Limits(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the agent may spend."""

    concurrent_collectors: Annotated[
        Positive, Meta(description="how many collectors on demand may run at a time")
    ] = 3
    max_duration: Annotated[Duration, Meta(description="the longest lease")] = Duration(MAX_LEASE_S)
    default_duration: Annotated[
        Duration,
        Meta(description="the lease of a request without a duration, at most `max_duration`"),
    ] = Duration(MAX_LEASE_S)
    memory: Annotated[
        ByteCount,
        Meta(
            description="maps in the kernel and buffers in the agent, for all collectors together"
        ),
    ] = ByteCount(512 << 20)
    cpu_percent: Annotated[
        float,
        Meta(
            gt=0,
            le=1_000_000,
            description="CPU time that all collectors together may cause, in percent of one CPU "
            "over 10 s; by default 25 for each CPU of the machine",
        ),
    ] = field(default_factory=lambda: _for_each_cpu(25))
    continuous_cpu_percent: Annotated[
        float,
        Meta(
            gt=0,
            le=1_000_000,
            description="the part of it that continuous collectors may cause while no person "
            "watches them; by default 5 for each CPU of the machine",
        ),
    ] = field(default_factory=lambda: _for_each_cpu(5))
    subscriber_bytes_per_second: Annotated[
        ByteCount, Meta(description="the rate for one subscriber; events beyond it are lost")
    ] = ByteCount(10 << 20)
    stalled_subscriber: Annotated[
        Duration, Meta(description="end a subscription that has not been read for this long")
    ] = Duration(30)
    connection_age: Annotated[
        Duration, Meta(description="close connections of this age; clients reconnect and resume")
    ] = Duration(3600)
    keepalive: Annotated[
        Duration, Meta(description="ping a connection that has been silent for this long")
    ] = Duration(20)
    replay_bytes: Annotated[
        ByteCount, Meta(description="how much of its stream a session keeps for later subscribers")
    ] = ByteCount(4 << 20)
    subscriber_queue_bytes: Annotated[
        ByteCount, Meta(description="the queue of one subscriber, at most and by default")
    ] = ByteCount(8 << 20)
    ended_sessions: Annotated[
        Duration, Meta(description="how long an ended session's stream can still be read")
    ] = Duration(60)
    ended_bytes: Annotated[
        ByteCount,
        Meta(
            description="how much the streams of ended sessions may keep; it counts towards "
            "`memory`, where ended sessions give way before collectors at work"
        ),
    ] = ByteCount(16 << 20)
    prometheus_series: Annotated[
        Positive,
        Meta(description="label sets in each collector's metrics; further ones are `other`"),
    ] = 200
    connections: Annotated[
        Positive,
        Meta(
            description="connections at a time, over TCP and over unix sockets each; fewer where "
            "they would take more than a quarter of the agent's descriptors (`RLIMIT_NOFILE`), or, "
            "over TCP, a quarter of those that the agent and its collectors leave"
        ),
    ] = 256
    connections_per_peer: Annotated[
        Positive,
        Meta(
            description="connections at a time of one user of this machine; over unix sockets, "
            "root and the agent's own user need only stay within `connections`"
        ),
    ] = 128
    connection_handshake: Annotated[
        Duration, Meta(description="close connections that have not begun HTTP/2 in this time")
    ] = Duration(5)
    connection_idle: Annotated[
        Duration, Meta(description="close connections without a call for this long")
    ] = Duration(300)
    peer_bytes_per_second: Annotated[
        ByteCount,
        Meta(description="how fast one peer may send, over all its connections; more has to wait"),
    ] = ByteCount(1 << 20)
    peer_calls_per_second: Annotated[
        Positive,
        Meta(
            description="how many calls a second one peer may begin, over all its connections; "
            "more have to wait"
        ),
    ] = 1000
    calls_per_connection: Annotated[
        Positive,
        Meta(description="calls under way on one connection; clients let further ones wait"),
    ] = 100
    http2_streams_per_peer: Annotated[
        Positive,
        Meta(
            description="HTTP/2 streams that one user of this machine may have open, over all its "
            "connections: calls that wait for their request, or whose answer is not read, count "
            "too; a connection that opens more is closed"
        ),
    ] = 1000
    calls: Annotated[
        Positive,
        Meta(
            description="calls under way that are answered once, over TCP and over unix sockets "
            "each"
        ),
    ] = 400
    calls_per_peer: Annotated[
        Positive, Meta(description="such calls of one user of this machine")
    ] = 100
    streams: Annotated[
        Positive,
        Meta(
            description="subscriptions and watches at a time, over TCP and over unix sockets each"
        ),
    ] = 256
    streams_per_peer: Annotated[
        Positive, Meta(description="subscriptions and watches of one user of this machine")
    ] = 128
