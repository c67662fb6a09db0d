"""The colony's log on standard error: lines for people, or JSON for machines. One record is one
line, whatever its values hold; only tracebacks that people read have more."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, Final, Literal

import structlog

from coral.wire.text import safe_lines

_MOST_TEXT: Final = 64 << 10  # characters of one value

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.log")


def configure(log_format: Literal["console", "json"], level: str) -> None:
    """Sets up logging for the process."""
    console = log_format == "console"
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(
            colors=bool(sys.stderr and sys.stderr.isatty()),
            exception_formatter=structlog.dev.plain_traceback,
        )
        if console
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _clean_for_people if console else _clean,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_LibraryRecords()], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)


def say(text: str) -> None:
    """Writes TEXT to standard error as it is, for the person that starts the colony."""
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")


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
