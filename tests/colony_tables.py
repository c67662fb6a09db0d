"""A colony's tables in a plain DuckDB, filled by hand: what named queries are tried on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from coral.colony.answers.sources import Sources
from coral.colony.tables import LEVELS, STACKS, TABLES, schema_of

T = TypeVar("T")

_ROLLED_UP = [name for name, table in TABLES.items() if table.is_rolled_up]
TABLES_OF_ROWS = [STACKS, *TABLES, *(it.name(name) for it in LEVELS for name in _ROLLED_UP)]
SMALL_TABLES = {
    "ledger": """id BIGINT, agent VARCHAR, session VARCHAR, kind VARCHAR, service VARCHAR,
        started_ns BIGINT, config VARCHAR, attributes VARCHAR, last_seq UBIGINT, produced UBIGINT,
        stored UBIGINT, lost UBIGINT, lost_by_stage VARCHAR, lost_in_kernel VARCHAR,
        updated_ns BIGINT, ended VARCHAR, ended_detail VARCHAR, ended_ns BIGINT""",
    "gaps": "time_from_ns BIGINT, time_to_ns BIGINT, agent VARCHAR, why VARCHAR",
    "agents": """agent VARCHAR, address VARCHAR, version VARCHAR, kernel VARCHAR,
        connected BOOLEAN, detail VARCHAR, attributes VARCHAR, first_seen_ns BIGINT,
        last_seen_ns BIGINT""",
    "losses": """time_ns BIGINT, time_from_ns BIGINT, time_to_ns BIGINT, agent VARCHAR,
        session VARCHAR, service VARCHAR, kind VARCHAR, stage VARCHAR, in_kernel BOOLEAN,
        "count" UBIGINT""",
}


class PlainSources:
    """Every row is hot. A table of the colony is made when somebody asks for it."""

    def __init__(self, con: duckdb.DuckDBPyConnection, watermarks: dict[int, int], now: int):
        self._con = con
        self._watermarks = watermarks
        self.committed_ns = now

    missing = ()

    @property
    def tables(self) -> Sequence[str]:
        found = self._con.execute("SELECT table_name FROM duckdb_tables()").fetchall()
        return [name for (name,) in found]

    def made(self, table: str) -> str:
        """TABLE, which is there from now on."""
        if table not in self.tables:
            empty = pa.Table.from_pylist([], schema_of(table))
            self._con.register("empty", empty)
            self._con.execute(f"CREATE TABLE {table} AS SELECT * FROM empty")
        return table

    def columns(self, table: str) -> Sequence[str]:
        sql = "SELECT column_name FROM duckdb_columns() WHERE table_name = ?"
        return [name for (name,) in self._con.execute(sql, [self.made(table)]).fetchall()]

    def rows(self, table: str, from_ns: int, to_ns: int) -> str:  # noqa: ARG002
        return f"SELECT * FROM {self.made(table)}"

    def hot(self, table: str) -> str:
        return self.rows(table, 0, 0)

    def files(self, table: str, from_ns: int, to_ns: int) -> Sequence[Path]:  # noqa: ARG002
        return []

    def kept_from_ns(self, table: str) -> int | None:
        ((oldest_ns,),) = self._con.execute(
            f"SELECT min(time_ns) FROM {self.made(table)}"
        ).fetchall()
        return int(oldest_ns) if oldest_ns is not None else None

    def watermark_ns(self, width_ns: int) -> int:
        return self._watermarks.get(width_ns, 0)


class PlainReads:
    """A store that holds what `add` gave it."""

    def __init__(self, now_ns: int) -> None:
        self.con = duckdb.connect()
        for name, columns in SMALL_TABLES.items():
            self.con.execute(f"CREATE TABLE {name} ({columns})")
        self.watermarks: dict[int, int] = {}
        self.now_ns = now_ns

    def add(self, table: str, *rows: dict[str, Any]) -> None:
        named = dict.fromkeys(name for row in rows for name in row)
        if table in TABLES_OF_ROWS:
            self.sources().made(table)
            schema = pa.schema([field for field in schema_of(table) if field.name in named])
            assert len(schema) == len(named), named.keys() - set(schema.names)
            arrow = pa.Table.from_pylist(list(rows), schema)
        else:
            arrow = pa.Table.from_pylist([{**named, **row} for row in rows])
        self.con.register("added", arrow)
        if table in self.sources().tables:
            self.con.execute(f"INSERT INTO {table} BY NAME SELECT * FROM added")
        else:
            self.con.execute(f"CREATE TABLE {table} AS SELECT * FROM added")

    def sources(self) -> PlainSources:
        return PlainSources(self.con, self.watermarks, self.now_ns)

    async def snapshot(
        self,
        work: Callable[[duckdb.DuckDBPyConnection, Sources], T],
        *,
        deadline_s: float,  # noqa: ARG002
    ) -> T:
        return work(self.con.cursor(), self.sources())


class Sealed(PlainSources):
    """A table `calls` of 200 rows: those before the time 100 are in a segment, the others hot."""

    def __init__(self, directory: Path) -> None:
        reads = PlainReads(1000)
        super().__init__(reads.con, {}, reads.now_ns)
        rows = [{"time_ns": at, "service": f"s{at % 2}", "calls": at} for at in range(200)]
        reads.add("calls", *rows[100:])
        self.segment = directory / "segment.parquet"
        pq.write_table(pa.Table.from_pylist(rows[:100]), self.segment)

    def cursor(self) -> duckdb.DuckDBPyConnection:
        return self._con.cursor()

    def files(self, table: str, from_ns: int, to_ns: int) -> Sequence[Path]:  # noqa: ARG002
        return [self.segment] if table == "calls" and from_ns < 100 else []
