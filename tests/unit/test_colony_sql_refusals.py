"""Statements that a worker's DuckDB and its rules refuse, without the process."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest

from coral.colony.answers.refusals import RefusedError
from coral.colony.answers.sql.database import connected, take_tables
from coral.colony.answers.sql.hot import ship
from coral.colony.answers.sql.statements import StatementError, needs_of
from tests.colony_tables import Sealed

REFUSALS = (RefusedError, StatementError, duckdb.Error)
REFUSED = {
    "SELECT 1; SELECT 2": "give one SELECT statement, and nothing else: this is SELECT, SELECT",
    "": "give one SELECT statement, and nothing else: this is nothing",
    "COPY calls TO '/tmp/x.csv'": "nothing else: this is COPY",
    "ATTACH '/tmp/x.db'": "nothing else: this is ATTACH",
    "INSTALL httpfs": "nothing else: this is LOAD",
    "LOAD httpfs": "nothing else: this is LOAD",
    "SET memory_limit='20GB'": "nothing else: this is SET",
    "PRAGMA database_list": "nothing else: this is PRAGMA",
    "CALL pragma_version()": "nothing else: this is CALL",
    "DROP VIEW calls": "nothing else: this is DROP",
    "INSERT INTO calls VALUES (1, 'x', 1)": "nothing else: this is INSERT",
    "CREATE TABLE x (a INT)": "nothing else: this is CREATE",
    "EXPORT DATABASE '/tmp/x'": "nothing else: this is EXPORT",
    "EXPLAIN ANALYZE SELECT 1": "nothing else: this is EXPLAIN",
    "WITH x AS (DELETE FROM calls RETURNING *) FROM x": "DELETE changes tables",
    "SELEC 1": "syntax error",
    "SELECT count(*) FROM read_csv('/etc/passwd')": "Permission Error",
    "SELECT * FROM read_text('/etc/hostname')": "Permission Error",
    "SELECT * FROM read_parquet('/etc/*')": "Permission Error",
    "SELECT * FROM glob('/*')": "Permission Error",
    "SELECT * FROM read_json('http://127.0.0.1:1/x')": "Permission Error",
    "SELECT * FROM parquet_metadata('/etc/passwd')": "Permission Error",
    "SELECT * FROM sniff_csv('/etc/passwd')": "Permission Error",
    "SELECT * FROM '/etc/passwd'": "no such table: '/etc/passwd'",
    "SELECT getenv('HOME')": "getenv does not exist",
    "SELECT * FROM query('DROP VIEW calls')": "Expected a single SELECT",
    "SELECT * FROM arrow_scan(1, 2, 3)": "No function matches",
    "SELECT * FROM sources": "no such table: 'sources'",
    "SELECT * FROM call": "no such table: 'call'; did you mean calls",
    "SELECT nothing FROM calls": 'column "nothing" not found',
    "SELECT 1 AS a, \0": "NUL byte",
}


def run(sources: Sealed, sql: str) -> None:
    """What a worker does, without its process."""
    connection = connected(64 << 20)
    shipment = None
    try:
        needs = needs_of(connection, sql)
        shipment = ship(sources.cursor(), sources, sorted(needs.tables), None, None)
        take_tables(connection, shipment.tables, shipment.fds)
        connection.sql(sql).to_arrow_reader().read_all()
    finally:
        connection.close()
        if shipment:
            shipment.close()


@pytest.mark.parametrize("sql", REFUSED)
def test_it_is_refused(tmp_path: Path, sql: str) -> None:
    with pytest.raises(REFUSALS) as refused:
        run(Sealed(tmp_path), sql)
    assert REFUSED[sql].lower() in str(refused.value).lower()
