"""What a statement may be, and what it reads, by DuckDB's own parser. Nothing is run here.

Only for the worker: the text is a stranger's, and a parser may fall over it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import duckdb

_ONE_SELECT: Final = "give one SELECT statement"
_CHANGES: Final = ("DELETE", "INSERT", "UPDATE", "MERGE", "COPY", "CREATE", "DROP", "ALTER")
# With these, columns are read that the statement does not name.
_ALL_COLUMNS: Final = ("STAR", "PIVOT", "SHOW_REF", "NATURAL", "POSITIONAL")


class StatementError(Exception):
    """It is no statement that is run here."""


@dataclass(frozen=True, slots=True)
class Needs:
    """The tables that a statement names, in lower case, and `words` among which all columns are
    that it reads; None where these may be any."""

    tables: frozenset[str]
    words: frozenset[str] | None


def needs_of(connection: duckdb.DuckDBPyConnection, sql: str) -> Needs:
    """What SQL reads. Raises `StatementError` for all but one SELECT."""
    if "\0" in sql:
        raise StatementError("the statement has a NUL byte")
    try:
        statements = duckdb.extract_statements(sql)
    except (duckdb.Error, ValueError) as error:
        raise StatementError(str(error)) from error
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        found = ", ".join(each.type.name for each in statements) or "nothing"
        raise StatementError(f"{_ONE_SELECT}, and nothing else: this is {found}")
    ((text,),) = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchall()
    tree = json.loads(text)
    if tree["error"]:
        raise StatementError(f"{_ONE_SELECT}: {tree['error_message']}")
    return _needs(tree["statements"])


def _needs(tree: Any) -> Needs:  # noqa: ANN401  JSON
    tables: set[str] = set()
    aliases: set[str] = set()
    rows: set[str] = set()
    words: set[str] = set()
    own: set[str] = set()
    whole = False
    for node in _nodes(tree):
        kind = str(node.get("type", ""))
        if kind.endswith("_QUERY_NODE") and kind.startswith(_CHANGES):
            raise StatementError(f"{_ONE_SELECT}: {kind.partition('_')[0]} changes tables")
        marks = {kind, str(node.get("class")), str(node.get("ref_type"))}
        whole = whole or any(mark.startswith(_ALL_COLUMNS) for mark in marks)
        if kind == "BASE_TABLE" and not node.get("schema_name"):
            tables.add(node["table_name"].lower())
            aliases.add(node.get("alias", "").lower())
        if kind == "COLUMN_REF":
            rows.add(node["column_names"][-1].lower())  # `SELECT t FROM t` is a whole row
        if "cte_map" in node:
            own.update(each["key"].lower() for each in node["cte_map"]["map"])
        words.update(each.lower() for each in _texts(node))
    whole = whole or bool(rows & (tables | aliases))
    return Needs(frozenset(tables - own), None if whole else frozenset(words))


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401  JSON
    """Every object in a tree."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _texts(node: dict[str, Any]) -> Iterator[str]:
    for value in node.values():
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (each for each in value if isinstance(each, str))
