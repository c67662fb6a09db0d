"""The colony's log on standard error: lines for people, or JSON for machines. One record is one
line, whatever its values hold; only tracebacks that people read have more. Writing never blocks,
raises or ends anything (wire/log_writer.py)."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, Final, Literal

import structlog

from coral.wire.log_writer import Lines, LogWriter
from coral.wire.text import safe_lines
from coral.wire.uncaught import log_uncaught

_STDERR: Final = 2
_CLOSE_S: Final = 0.5
_MOST_TEXT: Final = 64 << 10  # characters of one value

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.log")

_writer: LogWriter | None = None


def configure(log_format: Literal["console", "json"], level: str) -> None:
    """Sets up logging for the process, until `close`."""
    global _writer  # noqa: PLW0603  logging belongs to the process, as standard error does
    console = log_format == "console"
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(
            colors=bool(sys.stderr and sys.stderr.isatty()),
            exception_formatter=structlog.dev.plain_traceback,
        )
        if console
        else structlog.processors.JSONRenderer()
    )
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _clean_for_people if console else _clean,
        renderer,
    ]

    def notice(count: int) -> str:
        record: Any = {"event": "lines of this log were dropped", "count": count}
        for processor in processors:
            record = processor(None, "warning", record)
        return str(record)

    writer = _writer = LogWriter(_standard_error(), notice)
    writer.start()
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=lambda *_: Lines(writer),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_LibraryRecords()], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)
    log_uncaught(log)


def close() -> None:
    """Writes what was logged last, for at most half a second. What is logged afterwards is lost.
    Safe to call twice."""
    global _writer  # noqa: PLW0603
    if _writer:
        _writer.close(_CLOSE_S)
        _writer = None


def lines_dropped() -> int:
    """How many lines of the log were dropped so far."""
    return _writer.dropped if _writer else 0


def say(text: str) -> None:
    """Writes TEXT to standard error as it is, for the person that starts the colony; for at most
    half a second."""
    close()  # so that TEXT comes after what was logged
    writer = LogWriter(_standard_error(), str)
    writer.put(text)
    writer.close(_CLOSE_S)


def _standard_error() -> int:
    """The descriptor of standard error, or -1 if this process began without one. /dev/null then
    takes its number: otherwise a file of the store would, and C code would write into it."""
    if sys.stderr:
        return _STDERR
    with suppress(OSError):
        while (fd := os.open(os.devnull, os.O_RDWR)) < _STDERR:  # without standard input too
            pass
        if fd > _STDERR:
            os.close(fd)
    return -1


def _clean(
    _logger: object, _method: str, record: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """RECORD without anything that a terminal or a reader of the log would act on."""
    for key, value in record.items():
        record[key] = _cleaned(value)
    return record


def _clean_for_people(
    logger: object, method: str, record: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    for key, value in _clean(logger, method, record).items():
        if key == "exception":
            record[key] = "\n".join(f"    | {line}" for line in str(value).splitlines())
        elif isinstance(value, list):
            record[key] = ",".join(str(item) for item in value).replace("\n", "\\n")
        elif isinstance(value, str):
            record[key] = value.replace("\n", "\\n")
    return record


def _cleaned(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_cleaned(item) for item in value]
    if isinstance(value, bool | int | float | None):
        return value
    return safe_lines((value if isinstance(value, str) else repr(value))[:_MOST_TEXT])


class _LibraryRecords(logging.Handler):
    """Hands what libraries log with the standard library's `logging` on."""

    def emit(self, record: logging.LogRecord) -> None:
        """Logs RECORD."""
        with suppress(Exception):  # such as arguments that do not fit the message
            log.log(
                record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info
            )
