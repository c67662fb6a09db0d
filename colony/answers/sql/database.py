"""A worker's DuckDB: an empty one in memory, with views of the tables that a statement names, and
locked before the statement is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import duckdb
import pyarrow as pa

from coral.colony.quoting import literal, quoted

_HOT: Final = "hot_"


def connected(memory_bytes: int) -> duckdb.DuckDBPyConnection:
    """An empty database in memory, without spilling to disk and without extensions."""
    return duckdb.connect(
        ":memory:",
        config={
            "memory_limit": f"{memory_bytes >> 20}MiB",
            "threads": 1,
            "temp_directory": "",
            "secret_directory": "",
            "allow_persistent_secrets": "false",
            "allow_community_extensions": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "python_enable_replacements": "false",
            "preserve_insertion_order": "false",
        },
    )


def take_tables(
    connection: duckdb.DuckDBPyConnection, tables: Mapping[str, Any], fds: Sequence[int]
) -> Sequence[str]:
    """Makes a view of each of TABLES, and locks the connection: from now on it opens only the
    segments, whose paths are returned, and changes nothing."""
    paths: list[str] = []
    for name, told in tables.items():
        with pa.memory_map(f"/proc/self/fd/{fds[told['hot']]}") as mapped:
            connection.register(_HOT + name, pa.ipc.open_file(mapped).read_all())
        selects = [f"SELECT * FROM {quoted(_HOT + name)}"]
        files = told["files"]
        if files:
            listed = ", ".join(map(literal, files))
            selects.append(f"SELECT * FROM read_parquet([{listed}], union_by_name=true)")
            paths += files
        rows = " UNION ALL BY NAME ".join(selects)
        if told["window"]:
            from_ns, to_ns = told["window"]
            rows = f"SELECT * FROM ({rows}) WHERE time_ns >= {from_ns} AND time_ns < {to_ns}"
        connection.execute(f"CREATE VIEW {quoted(name)} AS {rows}")
    connection.execute(f"SET allowed_paths=[{', '.join(map(literal, paths))}]")
    connection.execute("SET enable_external_access=false")
    connection.execute("SET lock_configuration=true")
    connection.execute("BEGIN TRANSACTION READ ONLY")
    return paths
