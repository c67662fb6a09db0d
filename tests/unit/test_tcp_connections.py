"""Readings of connections become changes: each thing that moved is told once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coral.collectors.tcp_metrics.connections import NAMES, SLOTS, Changes, Connections
from coral.collectors.tcp_metrics.names import address_text

_WIDE = ("sk", "found_ns", "ended_ns", "established_ns", "rtt_sum_us")
_COUNTED = [name for name in NAMES if not name.startswith("retransmits_")]
_FOUND = [f"found_{name}" for name in NAMES[: NAMES.index("retransmits") + 1]]
RECORD = np.dtype(
    [
        *((name, "u8") for name in (*_WIDE, *_COUNTED, *_FOUND)),
        *((name, "u4") for name in ("pid", "backlog", "backlog_limit")),
        *((name, "u1") for name in ("role", "state", "end")),
        ("retransmits_of", "u4", (4,)),
        ("rtt", "u4", (SLOTS,)),
    ]
)
NOW = 10**12


def reading(*sockets: int, sent: int = 0, ended_ns: int = 0, state: int = 1) -> NDArray[Any]:
    """Connections of these sockets, which have all carried as much."""
    connections = np.zeros(len(sockets), RECORD)
    connections["sk"], connections["found_ns"] = sockets, 7
    connections["bytes_sent"], connections["ended_ns"] = sent, ended_ns
    connections["role"], connections["state"], connections["pid"] = 1, state, 1
    return connections


NOTHING = reading()


def sent(changes: Changes) -> dict[int, int]:
    """Bytes of the interval by socket."""
    return dict(zip(changes.connections["sk"].tolist(), changes.delta[:, 0].tolist(), strict=True))


def test_a_change_is_what_was_added() -> None:
    known = Connections()
    assert sent(known.advance(reading(1, 2, sent=10), NOTHING, NOW)) == {1: 10, 2: 10}
    assert sent(known.advance(reading(1, 2, sent=10), NOTHING, NOW)) == {}
    both = np.concatenate([reading(1, sent=15), reading(2, sent=10)])
    assert sent(known.advance(both, NOTHING, NOW)) == {1: 5}
    assert sent(known.advance(both, NOTHING, NOW, everything=True)) == {1: 0, 2: 0}


def test_what_it_had_carried_before_it_was_found_is_of_no_interval() -> None:
    known = Connections()
    found = reading(1, sent=1000)
    found["found_bytes_sent"] = 990
    changes = known.advance(found, NOTHING, NOW)
    assert sent(changes) == {1: 10}
    assert changes.total[:, 0].tolist() == [1000]
    found["bytes_sent"] = 1005
    assert sent(known.advance(found, NOTHING, NOW)) == {1: 5}


def test_one_that_was_not_read_for_a_moment_goes_on_where_it_was() -> None:
    known = Connections()
    known.advance(reading(1, 2, sent=10), NOTHING, NOW)
    for _ in range(10):
        known.advance(reading(2, sent=10), NOTHING, NOW)
    changes = known.advance(reading(1, sent=30), NOTHING, NOW)
    assert sent(changes) == {1: 20}
    assert not changes.new.any()


def test_what_ends_between_the_map_and_the_ring_is_told_once() -> None:
    known = Connections()
    known.advance(reading(1, sent=10), NOTHING, NOW)
    ended = reading(1, sent=14, ended_ns=NOW, state=7)
    changes = known.advance(reading(1, sent=12), ended, NOW)
    assert sent(changes) == {1: 4}
    assert changes.connections["ended_ns"].tolist() == [NOW]
    assert not len(changes.open)


def test_a_socket_whose_address_is_used_again_is_another_connection() -> None:
    known = Connections()
    known.advance(reading(1, sent=10), NOTHING, NOW)
    again = reading(1, sent=3)
    again["found_ns"] = 8
    changes = known.advance(again, reading(1, sent=11, ended_ns=NOW, state=7), NOW)
    assert sorted(changes.delta[:, 0].tolist()) == [1, 3]
    assert sorted(changes.new.tolist()) == [False, True]


@pytest.mark.parametrize("age_ns", [0, 1_000_000_000])
def test_a_socket_kept_after_its_end_is_told_when_its_cause_is_known(age_ns: int) -> None:
    known = Connections()
    known.advance(reading(1, sent=10), NOTHING, NOW)
    kept = reading(1, sent=10, ended_ns=NOW, state=7)
    changes = known.advance(kept, NOTHING, NOW + age_ns)
    assert len(changes) == bool(age_ns)
    # It is told once, by the map or by the ring.
    assert len(known.advance(NOTHING, kept, NOW + age_ns)) == (not age_ns)


def test_one_that_is_being_made_is_told_when_it_is() -> None:
    made = reading(1, sent=10)
    made["pid"] = 0
    assert len(Connections().advance(made, NOTHING, NOW)) == 0


def test_how_often_it_is_read_until_its_end_is_told_makes_no_difference() -> None:
    known = Connections()
    known.advance(reading(1, sent=10), NOTHING, NOW)
    kept = reading(1, sent=15, ended_ns=NOW, state=7)
    for _ in range(10):
        assert len(known.advance(kept, NOTHING, NOW)) == 0
    changes = known.advance(kept, NOTHING, NOW + 1_000_000_000)
    assert sent(changes) == {1: 5}
    assert not changes.new.any()


def test_the_last_reading_tells_every_end() -> None:
    known = Connections()
    kept = reading(1, sent=15, ended_ns=NOW, state=7)
    assert sent(known.advance(kept, NOTHING, NOW, everything=True)) == {1: 15}


def test_figures_that_fall_while_they_are_read_are_no_negative_change() -> None:
    known = Connections()
    known.advance(reading(1, sent=10), NOTHING, NOW)
    assert sent(known.advance(reading(1, sent=9), NOTHING, NOW)) == {}
    assert sent(known.advance(reading(1, sent=12), NOTHING, NOW)) == {1: 2}
    ended = reading(1, sent=11, ended_ns=NOW, state=7)
    changes = known.advance(NOTHING, ended, NOW)
    assert (changes.total[0, 0], changes.delta[0, 0]) == (11, 0)


def test_addresses_are_shown_as_people_write_them() -> None:
    assert address_text(bytes(10) + b"\xff\xff\x7f\0\0\1") == "127.0.0.1"
    assert address_text(bytes(15) + b"\1") == "::1"


@pytest.mark.parametrize("name", ["segments_sent", "segments_received", "retransmits"])
def test_counters_of_32_bits_go_on_after_they_wrap_around(name: str) -> None:
    narrow = np.dtype(
        [(n, "u4" if n == name else RECORD[n].base, RECORD[n].shape) for n in RECORD.names or ()]
    )
    known, column = Connections(), NAMES.index(name)
    found = np.zeros(1, narrow)
    found["sk"], found["found_ns"], found["pid"], found["role"] = 1, 7, 1, 1
    found[name] = found[f"found_{name}"] = 2**32 - 10
    known.advance(found, NOTHING.astype(narrow), NOW)
    for figure, added, total in (
        (2**32 - 1, 9, 2**32 - 1),
        (5, 6, 2**32 + 5),
        (4, 0, 2**32 + 5),  # it was read while it moved
        (2**31, 2**31 - 5, 2**32 + 2**31),
    ):
        found[name] = figure
        changes = known.advance(found, NOTHING.astype(narrow), NOW, everything=True)
        assert changes.delta[:, column].tolist() == [added]
        assert changes.total[:, column].tolist() == [total]
    ended = found.copy()
    ended["ended_ns"], ended[name] = NOW, 2**32 - 1
    changes = known.advance(NOTHING.astype(narrow), ended, NOW)
    assert changes.delta[:, column].tolist() == [2**31 - 1]
    assert changes.total[:, column].tolist() == [2**33 - 1]


def test_a_first_reading_beyond_half_of_32_bits_is_whole() -> None:
    busy = np.zeros(1, np.dtype([*RECORD.descr[:-1], ("rtt", "u4", (SLOTS,))]))
    busy["sk"], busy["pid"], busy["role"], busy["rtt"] = 1, 1, 1, 2**32 - 1
    changes = Connections().advance(busy, busy[:0], NOW)
    assert changes.delta[0, -2] == changes.total[0, -2] == 2**32 - 1
