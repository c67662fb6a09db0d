"""The store's core, step by step: sealing, retiring, rollups over restarts, files that cannot be
read."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import pyarrow.parquet as pq
import pytest

from coral.colony.store import HOUR_NS, MINUTE_NS, Settings, Sources, StoreError, Tier
from coral.colony.store.catalog import Catalog, Segment
from coral.colony.store.core import Core
from coral.colony.store.database import Database
from tests.colony_store import BEGIN_NS, SECOND_NS, TABLE, PlainRows, Sender, minutes


class Clock:
    """Goes when told to."""

    def __init__(self) -> None:
        self.now_ns = BEGIN_NS

    def __call__(self) -> int:
        return self.now_ns


class Bench:
    """A core of a directory, and how to look into it."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.clock = Clock()
        values = {"clock_ns": self.clock, "linger_s": 0.0, **settings}
        self.settings = Settings(**values)  # type: ignore[arg-type]
        self.directory = directory
        self.core = self._opened()

    def _opened(self) -> Core:
        core = Core(self.directory, self.settings, PlainRows())
        core.open()
        core.rebuild()
        return core

    def restart(self) -> None:
        """Ends in an orderly way, and begins again."""
        self.core.close()
        self.core = self._opened()

    def seal(self) -> Segment:
        """What is due."""
        job = self.core.next_seal(self.clock.now_ns)
        assert job
        segment = job.run()
        self.core.register(segment)
        return segment

    @contextmanager
    def sources(self) -> Iterator[Sources]:
        """One snapshot."""
        with self.core.database.cursor() as cursor:
            cursor.execute("BEGIN TRANSACTION READ ONLY")
            yield Sources.of(cursor, self.directory, PlainRows())

    def numbers(self, agent: str = "a") -> list[int]:
        """Of the rows of AGENT."""
        with self.sources() as sources:
            query = f"SELECT number FROM ({sources.rows(TABLE)}) WHERE agent = ? ORDER BY number"
            return [it for (it,) in sources.cursor.execute(query, [agent]).fetchall()]

    def calls(self, table: str) -> dict[int, int]:
        """Sums by minute."""
        with self.sources() as sources:
            if table not in sources.tables:
                return {}
            found = sources.cursor.sql(sources.rows(table)).to_arrow_table()
        return dict(minutes(found))

    def files(self) -> list[str]:
        """Of segments, finished or not."""
        return sorted(it.name for it in (self.directory / "segments").glob("*/*"))


Make = Callable[..., Bench]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Make]:
    made: list[Bench] = []

    def make(**settings: object) -> Bench:
        made.append(Bench(tmp_path, **settings))
        return made[-1]

    yield make
    for it in made:
        it.core.close()


def test_a_full_generation_becomes_a_sorted_segment(bench: Make) -> None:
    it = bench(seal_rows=60)
    senders = [Sender("b", service="web"), Sender("a", service="shop")]
    for second in range(4):
        deliveries = [sender.next(10, BEGIN_NS + second * SECOND_NS) for sender in senders]
        it.core.commit(deliveries)
    # Rows that come while a generation is being sealed go into the next.
    job = it.core.next_seal(it.clock.now_ns)
    assert job
    assert job.generation.rows == 60
    it.core.commit([senders[1].next(5)])
    it.core.register(job.run())
    (segment,) = it.core.catalog.segments
    assert (segment.rows, segment.tier) == (60, Tier.RAW)
    assert (segment.from_ns, segment.to_ns) == (BEGIN_NS, BEGIN_NS + 2 * SECOND_NS)
    table = pq.read_table(it.directory / segment.path)
    order = list(
        zip(*(table[name].to_pylist() for name in ("service", "agent", "time_ns")), strict=True)
    )
    assert order == sorted(order)
    assert [hot.rows for hot in it.core.catalog.generations if hot.table == TABLE] == [25]
    assert it.numbers("a") == list(range(1, 46))
    assert it.numbers("b") == list(range(1, 41))


def test_a_generation_that_is_old_is_sealed_whatever_its_size(bench: Make) -> None:
    it = bench()
    it.core.commit([Sender().next(1, lost={"map_full": 1})])
    assert not it.core.next_seal(it.clock.now_ns)
    it.clock.now_ns += int(it.settings.seal_after_s[Tier.RAW] * 1e9)
    assert it.seal().rows == 1
    assert it.numbers() == [1]
    assert not it.core.next_seal(it.clock.now_ns)
    it.clock.now_ns += int(it.settings.seal_after_s[Tier.HOUR] * 1e9)
    assert it.seal().table == "losses"


def test_a_crash_before_a_segment_is_registered_leaves_an_orphan_that_is_deleted(
    bench: Make,
) -> None:
    it = bench(seal_rows=1)
    it.core.commit([Sender().next(5)])
    job = it.core.next_seal(it.clock.now_ns)
    assert job
    job.run()
    unfinished = it.directory / "segments" / TABLE / "0000000099.parquet.unfinished"
    unfinished.write_bytes(b"half")
    assert len(it.files()) == 2
    it.restart()
    assert it.files() == []
    assert it.numbers() == [1, 2, 3, 4, 5]
    it.seal()
    assert it.numbers() == [1, 2, 3, 4, 5]
    assert len(it.files()) == 1


def test_a_sealing_can_be_registered_after_the_database_was_opened_again(bench: Make) -> None:
    it = bench(seal_rows=1)
    it.core.commit([Sender().next(5)])
    job = it.core.next_seal(it.clock.now_ns)
    assert job
    segment = job.run()
    it.core.recover()
    it.core.register(segment)
    it.core.register(segment)  # as after a failure that was none
    assert it.numbers() == [1, 2, 3, 4, 5]


def test_a_segment_that_has_not_all_rows_is_not_registered(bench: Make) -> None:
    it = bench(seal_rows=1)
    it.core.commit([Sender().next(5)])
    job = it.core.next_seal(it.clock.now_ns)
    assert job
    with pytest.raises(StoreError, match="not the rows of hot_numbers_1"):
        it.core.register(replace(job.run(), rows=4))
    assert it.numbers() == [1, 2, 3, 4, 5]
    it.seal()
    assert it.numbers() == [1, 2, 3, 4, 5]


def test_new_columns_make_a_new_generation_and_old_rows_have_none(bench: Make) -> None:
    it = bench()
    sender = Sender()
    it.core.commit([sender.next(2)])
    it.core.commit([sender.next(2, columns={"errors": [1, 2]})])
    it.core.commit([sender.next(2)])
    rows = [hot.rows for hot in it.core.catalog.generations if hot.table == TABLE]
    assert rows == [2, 4]
    it.clock.now_ns += HOUR_NS
    it.seal()
    it.restart()
    it.core.commit([sender.next(2)])
    with it.sources() as sources:
        query = f"SELECT number, errors FROM ({sources.rows(TABLE)}) ORDER BY number"
        found = sources.cursor.execute(query).fetchall()
        assert "errors" in sources.columns(TABLE)
    assert found == [(n, {3: 1, 4: 2}.get(n)) for n in range(1, 9)]


def segment(table: str, to_s: int, number: int, size_bytes: int = 10) -> Segment:
    at_ns = BEGIN_NS + to_s * SECOND_NS
    return Segment(table, number, f"{number}", "", at_ns, at_ns, 1, size_bytes, at_ns)


def test_segments_retire_by_age_of_their_tier_and_then_the_oldest_and_rawest_first() -> None:
    keep_s = {Tier.RAW: 100.0, Tier.MINUTE: 1000.0, Tier.HOUR: 10000.0}
    settings = Settings(keep_s=keep_s, most_bytes=45)
    hours, stacks = segment("numbers_1h", 0, 1), segment("cpu_stacks", 0, 2)
    minute, later_minute = segment("numbers_1m", 800, 3), segment("numbers_1m", 900, 4)
    old, raw, later_raw = segment(TABLE, 890, 5), segment(TABLE, 920, 7), segment(TABLE, 960, 6)
    catalog = Catalog([], [hours, stacks, minute, later_minute, old, later_raw, raw])
    now_ns = BEGIN_NS + 1000 * SECOND_NS

    def retired(other_bytes: int) -> list[Segment]:
        return list(catalog.to_retire(settings, now_ns, other_bytes))

    assert retired(-15) == [old]
    assert retired(0) == [old, raw, later_raw]
    assert retired(10) == [old, raw, later_raw, minute]
    assert retired(1000) == [old, raw, later_raw, minute, later_minute, hours, stacks]


def test_a_clock_that_is_ahead_does_not_keep_a_segment_for_ever() -> None:
    ahead = replace(segment(TABLE, 0, 1), to_ns=BEGIN_NS + 10**9 * SECOND_NS)
    day_later_ns = BEGIN_NS + 86_400 * SECOND_NS
    assert list(Catalog([], [ahead]).to_retire(Settings(), day_later_ns, 0)) == [ahead]


def test_a_retired_segment_is_read_to_the_end_and_its_file_deleted_after(bench: Make) -> None:
    it = bench(seal_rows=1)
    sender = Sender()
    it.core.commit([sender.next(1000)])
    it.seal()
    it.clock.now_ns += 2 * HOUR_NS
    it.core.commit([sender.next(3, it.clock.now_ns)])
    with it.sources() as sources:
        query = f"SELECT count(*) FROM ({sources.rows(TABLE)})"
        assert sources.cursor.execute(query).fetchall() == [(1003,)]
        it.clock.now_ns += 5 * HOUR_NS
        assert len(it.core.retire(it.clock.now_ns)) == 1
        it.core.retire(it.clock.now_ns)
        assert sources.cursor.execute(query).fetchall() == [(1003,)]
    assert it.numbers() == [1001, 1002, 1003]
    assert len(it.files()) == 1
    it.core.retire(it.clock.now_ns)
    assert it.files() == []


class LateToFail:
    """A connection whose COMMIT is durable, and raises all the same."""

    def __init__(self, real: duckdb.DuckDBPyConnection) -> None:
        self._real = real

    def execute(self, statement: str, *parameters: object) -> duckdb.DuckDBPyConnection:
        done = self._real.execute(statement, *parameters)
        if statement == "COMMIT":
            raise duckdb.IOException("the log could not be synced")
        return done


def test_a_segment_whose_retiring_failed_late_counts_until_its_file_is_deleted(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = bench(seal_rows=1)
    it.core.commit([Sender().next(1000)])
    segment = it.seal()
    it.clock.now_ns += 7 * HOUR_NS
    failing = LateToFail(it.core.database.writer)
    with monkeypatch.context() as patched:
        patched.setattr(Database, "writer", failing)
        with pytest.raises(duckdb.IOException):
            it.core.retire(it.clock.now_ns)
    assert it.core.must_recover
    it.core.recover()
    assert it.core.catalog.segments == []
    assert [each.segment for each in it.core.retired] == [segment]
    assert len(it.files()) == 1
    it.core.retire(it.clock.now_ns)
    assert (it.files(), it.core.retired) == ([], [])


def test_what_a_question_spills_is_no_reason_to_retire_rows(bench: Make) -> None:
    it = bench(seal_rows=1, most_bytes=10**6)
    it.core.commit([Sender().next(1000)])
    it.seal()
    spilled = it.core.directory / "spill/of_a_question"
    spilled.parent.mkdir(exist_ok=True)
    spilled.write_bytes(bytes(10**7))
    assert it.core.database.spilled_bytes == 10**7
    assert it.core.retire(it.clock.now_ns) == []
    spilled.unlink()


def test_a_reader_keeps_a_generation_that_is_sealed_and_dropped(bench: Make) -> None:
    it = bench(seal_rows=50_000)
    sender = Sender()
    it.core.commit([sender.next(50_000)])
    with it.sources() as sources:
        query = f"SELECT count(*), sum(number) FROM ({sources.rows(TABLE)})"
        it.seal()
        for _ in range(5):
            it.core.commit([sender.next(50_000)])
            it.seal()
        assert sources.cursor.execute(query).fetchall() == [(50_000, 50_000 * 50_001 // 2)]
    assert it.numbers() == list(range(1, 300_001))


def hours(by_minute: dict[int, int], until_ns: int) -> dict[int, int]:
    """Sums of sums of minutes, by the number of the hour's first minute."""
    sums: dict[int, int] = {}
    for slot, calls in by_minute.items():
        hour = slot // 60 * 60
        if hour * MINUTE_NS < until_ns:
            sums[hour] = sums.get(hour, 0) + calls
    return sums


def test_rollups_are_exact_over_restarts_and_with_late_rows(bench: Make) -> None:
    """At every moment: minutes before the watermark have all rows, and later ones none."""
    it = bench(seal_rows=300, lateness_s=20.0)
    rng = random.Random(7)
    senders = [Sender(name) for name in "abc"]
    for step in range(24):
        it.clock.now_ns += rng.randrange(1, 400) * SECOND_NS
        late_ns = [rng.choice([0, 1, 5, 30, 300, 4000]) * SECOND_NS for _ in senders]
        it.core.commit(
            sender.next(rng.randrange(50), it.clock.now_ns - late)
            for sender, late in zip(senders, late_ns, strict=True)
        )
        if rng.random() < 0.2 and it.core.next_seal(it.clock.now_ns):
            it.seal()
        if step % 8 == 5:
            it.restart()
        marks = it.core.making.watermarks
        raw, by_minute, by_hour = (it.calls(f"{TABLE}{level}") for level in ("", "_1m", "_1h"))
        before = {slot: n for slot, n in raw.items() if slot * MINUTE_NS < marks[MINUTE_NS]}
        assert by_minute == before
        assert by_hour == hours(by_minute, marks[HOUR_NS])
    assert len(by_hour) >= 1
    assert len(by_minute) > 30


def test_a_transaction_that_failed_is_stored_once(bench: Make) -> None:
    """Nobody knows, until the database is open again, whether the disk has it."""
    it = bench()
    sender = Sender()
    it.core.commit([sender.next(2)])
    # Not committed: a statement fails.
    it.core.database.writer.execute("ALTER TABLE marks RENAME TO hidden")
    with pytest.raises(duckdb.CatalogException):
        it.core.commit([sender.next(2)])
    assert it.core.has_pending
    assert it.core.book.standing(("a", "c")).last_seq == 2  # type: ignore[union-attr]
    it.core.database.writer.execute("ALTER TABLE hidden RENAME TO marks")
    it.core.commit()
    assert it.numbers() == [1, 2, 3, 4]
    # Committed, and not known to be.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(it.core, "_done", lambda _: None)
        it.core.commit([sender.next(2)])
    assert it.core.has_pending
    it.core.recover()
    assert not it.core.has_pending
    assert it.core.book.standing(("a", "c")).last_seq == 6
    assert it.numbers() == [1, 2, 3, 4, 5, 6]


def newer(content: bytes) -> bytes:
    """CONTENT of a DuckDB file, as of a version that nobody has: in the first block, its checksum
    comes first, the version at offset 12."""
    block = bytearray(content[:4096])
    struct.pack_into("<Q", block, 12, 900)
    checksum = 5381
    for (word,) in struct.iter_unpack("<Q", block[8:]):
        checksum ^= (word * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    struct.pack_into("<Q", block, 0, checksum)
    return bytes(block) + content[4096:]


def of_other_tables(_: bytes) -> bytes:
    """A DuckDB file that no colony has made."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "other.duckdb"
        with duckdb.connect(str(path)) as connection:
            connection.execute("CREATE TABLE marks (name VARCHAR)")
        return path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        newer,
        of_other_tables,
        lambda _: b"",
        lambda _: b"text" * 5000,
        lambda it: it[:4096] + bytes(8192),
    ],
    ids=["newer version", "other tables", "empty", "no database", "damaged"],
)
def test_a_hot_file_that_cannot_be_read_is_moved_aside_and_segments_stay(
    bench: Make, damage: Callable[[bytes], bytes]
) -> None:
    it = bench(seal_rows=5)
    sender = Sender()
    it.core.commit([sender.next(5)])
    it.seal()
    lost = sender.next(3)
    it.core.commit([lost])
    sender.last_seq = lost.after_seq
    it.core.close()
    hot = it.directory / "hot.duckdb"
    damaged = damage(hot.read_bytes())
    hot.write_bytes(damaged)

    it.core = it._opened()
    aside = it.core.database.moved_aside
    assert aside
    assert aside.read_bytes() == damaged
    assert it.numbers() == [1, 2, 3, 4, 5]
    # The segment knows how its session stood: it goes on from there.
    assert it.core.book.expected_seq(("a", "c")) == sender.last_seq == 5
    it.core.commit([sender.next(3), Sender("b").next(3)])
    it.restart()
    assert it.core.database.moved_aside is None
    assert it.numbers() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert it.numbers("b") == [1, 2, 3]
    assert it.core.book.standing(("a", "c")).stored == 8  # type: ignore[union-attr]


def test_a_new_hot_file_rolls_nothing_up_twice(bench: Make) -> None:
    it = bench(seal_rows=12)
    sender = Sender()
    for _ in range(40):
        it.clock.now_ns += 153 * SECOND_NS
        it.core.commit([sender.next(2, it.clock.now_ns)])
        if it.core.next_seal(it.clock.now_ns):
            it.seal()
    while it.core.next_seal(it.clock.now_ns):
        it.seal()
    it.core.close()
    (it.directory / "hot.duckdb").unlink()
    it.core = it._opened()
    # Rows of rollups that were in the hot file alone are made again of the rows that are left.
    it.core.commit()
    raw, until_ns = it.calls(TABLE), it.core.making.watermarks
    assert sum(raw.values()) // 2 in range(60, 81)
    assert it.calls(f"{TABLE}_1m") == {
        slot: calls for slot, calls in raw.items() if slot * MINUTE_NS < until_ns[MINUTE_NS]
    }
    assert it.calls(f"{TABLE}_1h") == hours(raw, until_ns[HOUR_NS])
    assert len(it.calls(f"{TABLE}_1h")) == 1


def test_a_file_that_is_open_elsewhere_is_not_moved(tmp_path: Path, bench: Make) -> None:
    it = bench()
    it.core.close()
    (tmp_path / "hot.duckdb").chmod(0o600)
    (tmp_path / "hot.duckdb").rename(tmp_path / "x")
    (tmp_path / "hot.duckdb").mkdir()
    with pytest.raises(StoreError, match=r"hot\.duckdb"):
        it._opened()
    (tmp_path / "hot.duckdb").rmdir()
    (tmp_path / "x").rename(tmp_path / "hot.duckdb")
    it.core = it._opened()
    assert it.core.database.moved_aside is None


@pytest.mark.parametrize("harm", ["gone", "cut", "other"])
def test_rows_of_a_segment_that_somebody_harmed_are_missing_and_the_others_there(
    bench: Make, harm: str
) -> None:
    it = bench(seal_rows=5)
    sender = Sender()
    for _ in range(2):
        it.core.commit([sender.next(5)])
        it.seal()
    path = it.directory / it.core.catalog.segments[0].path
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] if harm == "cut" else b"PAR1" * 1000)
    it.restart()
    assert it.numbers() == [6, 7, 8, 9, 10]
    with it.sources() as sources:
        assert len(sources.files(TABLE)) == 1
        assert [(found.table, found.rows) for found in sources.missing] == [(TABLE, 5)]
