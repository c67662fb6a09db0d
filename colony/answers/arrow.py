"""Tables as messages of an Arrow IPC stream, none of them large."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pyarrow as pa

PART_BYTES: Final = 1 << 20
"""About how large a part is before it is compressed: gRPC takes messages of up to 4 MiB."""


class _Sink:
    """Keeps what was written since the last look."""

    closed = False

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: object) -> int:
        part = bytes(memoryview(data))  # type: ignore[arg-type]
        self._parts.append(part)
        return len(part)

    def flush(self) -> None:
        """There is nothing behind it."""

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


class Parts:
    """Writes batches of SCHEMA. All parts, one after the other, are an Arrow IPC stream, and each
    is one message: columns with dictionaries, whose values would be messages of their own, are sent
    without."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = pa.schema([_plain(field) for field in schema], schema.metadata)
        self._sink = _Sink()
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writer = pa.ipc.new_stream(self._sink, self._schema, options=options)
        # The writer sends it with the first batch, which may never come.
        self._first: bytes = self._schema.serialize().to_pybytes()

    def schema(self) -> bytes:
        """The first part."""
        return self._first

    def of(self, batch: pa.RecordBatch) -> Iterator[bytes]:
        """A batch in parts."""
        if batch.schema != self._schema:
            batch = batch.cast(self._schema)
        pieces = max(-(-batch.nbytes // PART_BYTES), 1)
        rows = max(-(-batch.num_rows // pieces), 1)
        for at in range(0, batch.num_rows, rows):
            self._writer.write_batch(batch.slice(at, rows))
            yield self._sink.take().removeprefix(self._first)


def _plain(field: pa.Field) -> pa.Field:
    kind = field.type
    return field.with_type(kind.value_type) if pa.types.is_dictionary(kind) else field


def parts_of(table: pa.Table) -> Iterator[bytes]:
    """A whole table."""
    parts = Parts(table.schema)
    yield parts.schema()
    for batch in table.to_batches():
        yield from parts.of(batch)
