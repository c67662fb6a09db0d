"""What a session can have copied of the head of a request besides its path: query, host, and the
ids of a trace. The C side is details.bpf.h."""

from __future__ import annotations

from enum import IntFlag
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coral.collectors.columns import Strings
from coral.collectors.http_latency.paths import path_text
from coral.collectors.http_latency.routes import CUT

# Flags of a record, as in connection.bpf.h.
_QUERY_CUT: Final = 4
_HOST_CUT: Final = 8


class Wants(IntFlag):
    """What a session wants, as in details.bpf.h."""

    QUERY = 1
    TRACE = 2
    HOST = 4


class Details(NamedTuple):
    """Indices of strings, each of shape (n,): 0, the empty string, where there is no such thing."""

    query: NDArray[np.uint32]
    host: NDArray[np.uint32]
    trace_id: NDArray[np.uint32]
    parent_span_id: NDArray[np.uint32]


def details_of(records: NDArray[Any], strings: Strings) -> Details:
    """What RECORDS, struct http_detailed of shape (n,), have of each, as STRINGS. A query or a host
    of which some is missing ends with "…"."""
    exchanges, flags = records["exchange"], records["exchange"]["path_flags"]
    paths = _characters(exchanges["path"])
    queries = _cut_out(paths, exchanges["path_bytes"], records["query_bytes"])
    hosts = _cut_out(_characters(records["host"]), np.uint16(0), records["host_bytes"])
    return Details(
        _texts(queries, (flags & _QUERY_CUT) > 0, strings),
        _texts(hosts, (flags & _HOST_CUT) > 0, strings),
        _ids(records["trace"], strings),
        _ids(records["parent"].reshape(-1, 1), strings),
    )


def _characters(words: NDArray[Any]) -> NDArray[np.uint8]:
    """WORDS, of shape (n, k), as bytes, of shape (n, 8 * k)."""
    return np.ascontiguousarray(words).view(np.uint8)


def _cut_out(
    characters: NDArray[np.uint8], start: NDArray[Any] | np.uint16, length: NDArray[Any]
) -> NDArray[np.bytes_]:
    """Of each row of CHARACTERS, of shape (n, width), those of a part: of shape (n,). No part has
    a zero byte."""
    count, width = characters.shape
    offsets = np.arange(width, dtype=np.intp)
    at = offsets + np.broadcast_to(start, count)[:, np.newaxis].astype(np.intp)
    parts = np.take_along_axis(characters, at.clip(max=width - 1), axis=1)
    parts[offsets >= length[:, np.newaxis]] = 0
    return parts.view(f"S{width}").reshape(count)


def _texts(
    parts: NDArray[np.bytes_], cut: NDArray[np.bool_], strings: Strings
) -> NDArray[np.uint32]:
    found = np.zeros(len(parts), np.uint32)
    found[~cut] = strings.indices(parts[~cut], path_text)
    found[cut] = strings.indices(parts[cut], lambda part: path_text(part) + CUT)
    return found


def _ids(numbers: NDArray[np.uint64], strings: Strings) -> NDArray[np.uint32]:
    """NUMBERS, of shape (n, words), the first words the highest, as hexadecimal numbers."""
    found = np.zeros(len(numbers), np.uint32)
    given = numbers.any(axis=1)
    digits = numbers[given].astype(">u8").tobytes().hex()
    width = 16 * numbers.shape[1]
    found[given] = [strings.index(digits[at : at + width]) for at in range(0, len(digits), width)]
    return found
