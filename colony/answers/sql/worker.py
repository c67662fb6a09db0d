"""A worker: a process that answers one statement, and ends.

    python -P -m coral.colony.answers.sql.worker SOCKET_FD PARENT_PID

It gets the sealed segments' paths, and the hot rows as Arrow in memory that it cannot write to.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any, Final

import duckdb
import pyarrow.compute  # noqa: F401  later it could not be read: see `confine`

from coral.colony.answers.arrow import Parts
from coral.colony.answers.sql.database import connected, take_tables
from coral.colony.answers.sql.frames import (
    DONE,
    ERROR,
    HEAD,
    MOST_BYTES,
    NEEDS,
    PART,
    QUESTION,
    READY,
    TABLES,
    frame,
    packed,
    unpacked,
)
from coral.colony.answers.sql.sandbox import confine, die_with_parent, limit, step_back
from coral.colony.answers.sql.statements import needs_of

_MOST_FDS: Final = 64
_BATCH_ROWS: Final = 16_384
# Beside DuckDB's own limit: parts of an answer, Arrow, what DuckDB does not count.
_BESIDE_BYTES: Final = 512 << 20


class _Line:
    """The connection to the colony."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)

    def send(self, letter: bytes, content: bytes = b"") -> None:
        self._socket.sendall(frame(letter, content))

    def receive(self, letter: bytes) -> tuple[Any, Sequence[int]]:
        """The message that is expected, and the descriptors that came with it. Ends the process
        where the colony is gone."""
        fds: list[int] = []
        head = b""
        while len(head) < HEAD.size:
            data, more, _, _ = socket.recv_fds(self._socket, HEAD.size - len(head), _MOST_FDS)
            if not data:
                sys.exit(0)
            head += data
            fds += more
        found, size = HEAD.unpack(head)
        if found != letter or size > MOST_BYTES:
            sys.exit(1)
        content = bytearray()
        while len(content) < size:
            data = self._socket.recv(min(size - len(content), 1 << 20))
            if not data:
                sys.exit(0)
            content += data
        return unpacked(bytes(content)), fds


def _answer(line: _Line, connection: duckdb.DuckDBPyConnection, sql: str, most_rows: int) -> None:
    reader = connection.sql(sql).to_arrow_reader(_BATCH_ROWS)
    parts = Parts(reader.schema)
    line.send(PART, parts.schema())
    rows, cut = 0, False
    for batch in reader:
        if rows + batch.num_rows > most_rows:
            batch, cut = batch.slice(0, most_rows - rows), True  # noqa: PLW2901
        rows += batch.num_rows
        for part in parts.of(batch):
            line.send(PART, part)
        if cut:
            break
    line.send(DONE, packed({"rows": rows, "cut": cut}))


def _words(error: BaseException, deadline_s: float) -> str:
    if isinstance(error, duckdb.InterruptException):
        return f"it took longer than {deadline_s:g} s, which is the limit"
    if isinstance(error, MemoryError | duckdb.OutOfMemoryException):
        return "it needs more memory than the limit"
    return str(error)


def main(fd: int, parent: int) -> None:
    """Answers one statement."""
    die_with_parent(parent)
    step_back()
    line = _Line(fd)
    line.send(READY)
    question, _ = line.receive(QUESTION)
    deadline_s, memory_bytes = question["deadline_s"], question["memory_bytes"]
    connection = connected(memory_bytes)
    connection.sql("SELECT 1").to_arrow_reader().read_all()  # imports what it needs
    limit(memory_bytes + _BESIDE_BYTES, int(deadline_s) + 5)
    threading.Timer(deadline_s, connection.interrupt).start()
    try:
        needs = needs_of(connection, question["sql"])
        words = None if needs.words is None else sorted(needs.words)
        line.send(NEEDS, packed({"tables": sorted(needs.tables), "words": words}))
        tables, fds = line.receive(TABLES)
        confine(take_tables(connection, tables, fds))
        _answer(line, connection, question["sql"], question["most_rows"])
    except Exception as error:  # noqa: BLE001  it is told to the caller
        line.send(ERROR, packed(_words(error, deadline_s)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
