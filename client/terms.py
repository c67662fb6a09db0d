"""What a subscriber asks for, as keyword arguments and as the contract's message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypedDict

from coral.mesh.v1 import ebpf_pb2 as pb

Overflow = Literal["drop_oldest", "drop_newest", "end"]

_AS_THEY_ARE: Final = ("after_seq", "queue_bytes", "interactive")
_LISTS: Final = ("pids", "tids", "comms", "syscalls", "pods")


class Terms(TypedDict, total=False):
    """How a subscriber wants its stream; everything is optional. Conditions on events must all
    hold; one that rows of a kind cannot meet, such as a thread id of a summary, is ignored."""

    after_seq: int
    """Resume after the event of this number. 0, the default: from the first one still kept."""
    pids: Sequence[int]
    """Only events of these processes, by thread group id."""
    tids: Sequence[int]
    """Only events of these threads."""
    comms: Sequence[str]
    """Only events of processes with these command names."""
    syscalls: Sequence[str]
    """Only events of these system calls, by name."""
    pods: Sequence[str]
    """Only events of the pods of these names, in a session that watches pods."""
    errors_only: bool
    """Only calls and connections that failed."""
    min_duration_s: float
    """Only events that took at least this long."""
    overflow: Overflow
    """When this subscriber's queue is full: the oldest events make room (the default), new ones
    are dropped, or the stream ends with `LimitExceededError`."""
    queue_bytes: int
    """How much may wait for this subscriber; at most the agent's limits.subscriber_queue_bytes,
    which is the default."""
    interactive: bool
    """A person is watching: the session is the last one to be preempted."""
    columns: bool
    """Summaries as numpy columns, in `Batch.columns`, which decode about a hundred times faster."""


def stream_request(
    collector_id: str, terms: pb.EbpfEventStreamRequest | None, wanted: Terms
) -> pb.EbpfEventStreamRequest:
    """The request for a stream: TERMS, and WANTED on top. Raises ValueError for a value that the
    contract has no place for."""
    if unknown := wanted.keys() - Terms.__annotations__.keys():
        raise ValueError(f"{', '.join(sorted(unknown))}: there is no such term of a stream")
    request = pb.EbpfEventStreamRequest()
    if terms:
        request.CopyFrom(terms)
    request.collector_id = collector_id
    for name in _AS_THEY_ARE:
        if name in wanted:
            setattr(request, name, wanted[name])
    request.filter.MergeFrom(_filter(wanted))
    if "overflow" in wanted:
        request.MergeFrom(_overflow(wanted["overflow"]))
    if wanted.get("columns"):
        request.summaries = pb.EbpfEventStreamRequest.SUMMARIES_COLUMNS
    return request


def _filter(wanted: Terms) -> pb.EventFilter:
    for name in _LISTS:
        if isinstance(wanted.get(name), str):
            raise ValueError(f"{name}: {wanted[name]!r} is a string; give a list")
    return pb.EventFilter(
        pids=wanted.get("pids"),
        tids=wanted.get("tids"),
        comms=wanted.get("comms"),
        syscalls=wanted.get("syscalls"),
        pods=wanted.get("pods"),
        errors_only=wanted.get("errors_only", False),
        min_duration_ns=round(wanted.get("min_duration_s", 0.0) * 1e9),
    )


def _overflow(overflow: str) -> pb.EbpfEventStreamRequest:
    try:
        return pb.EbpfEventStreamRequest(overflow=f"OVERFLOW_{overflow.upper()}")
    except ValueError:
        raise ValueError(
            f"overflow: {overflow!r} is not accepted; give drop_oldest, drop_newest or end"
        ) from None
