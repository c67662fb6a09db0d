"""Structured logs on standard error: lines for people, or JSON for machines.

One record is one line, whatever its values hold; only the tracebacks that people read have more,
each of which is indented. Writing never blocks, raises or ends anything (wire/log_writer.py).
Python's own warnings and uncaught exceptions, what libraries log, and what C code writes to
descriptor 2 (gRPC, libbpf) become records too.

Refusals of one kind, and what libraries say, are logged ten at once and then once a second, with
how many were left out (repeats.py). Starts and stops are always logged.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from typing import Any, Final, Literal

import structlog

from coral.agent.repeats import RepeatLimit
from coral.wire.log_writer import Lines, LogWriter
from coral.wire.text import safe_lines
from coral.wire.uncaught import log_uncaught

_STDERR: Final = 2
_CLOSE_S: Final = 0.5
_MOST_TEXT: Final = 64 << 10  # characters of one value
_MOST_NATIVE_LINE_BYTES: Final = 4096
# Events that callers cause at will. Not "refused by the kernel", which is about a start.
_REFUSALS: Final = frozenset({"refused", "connection refused", "connection closed"})
# The lines of C code that are logged at once: the stack of a crash has about this many.
_NATIVE_BURST: Final = 64

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.log")


class _Logging:
    """The logging of this process."""

    def __init__(self, renderer: structlog.typing.Processor, *, console: bool) -> None:
        self._renderer = renderer
        self._console = console
        self._limit = RepeatLimit()
        self.writer = LogWriter(_STDERR, self._notice)
        self.native = _NativeLines()

    def processors(self) -> list[structlog.typing.Processor]:
        """What a record goes through before it is rendered."""
        return [
            self._leave_out,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            self._bound,
            self._renderer,
        ]

    def _leave_out(
        self, _logger: object, _method: str, record: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        event = str(record.get("event", ""))
        # By caller too, so that one that floods the log does not hide the others' refusals.
        principal = str(record.pop("principal", ""))
        if event in _REFUSALS:
            left_out = self._limit.admit((event, str(record.get("code", "")), principal))
            if left_out is None:
                raise structlog.DropEvent
            if left_out:
                record["left_out"] = left_out
        return record

    def tell_left_out(self, *, at_end: bool = False) -> None:
        """Logs how many refusals were left out, for the kinds that are due, or for all AT_END."""
        for kind, left_out in self._limit.overdue(at_end=at_end):
            event, code, principal = kind if isinstance(kind, tuple) else (kind, "", "")
            log.warning(
                "refusals were left out of the log", like=event, code=code, caller=principal,
                count=left_out,
            )  # fmt: skip

    def _bound(
        self, _logger: object, _method: str, record: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        for key, value in record.items():
            record[key] = self._clean(value, is_traceback=key == "exception")
        return record

    def _clean(self, value: object, *, is_traceback: bool = False) -> object:
        """VALUE without anything that a terminal or a reader of the log would act on; for people in
        one line, unless it is a traceback."""
        if isinstance(value, list | tuple):
            return [self._clean(item) for item in value]
        if isinstance(value, bool | int | float | None):
            return value
        text = safe_lines(_without_middle(_as_text(value)))
        if not self._console:
            return text
        if is_traceback:
            # No record begins like this.
            return "\n".join(f"    | {line}" for line in text.splitlines())
        return text.replace("\n", "\\n")

    def _notice(self, count: int) -> str:
        """The line that says that COUNT lines were dropped."""
        record: dict[str, Any] = {"event": "lines of this log were dropped", "count": count}
        for processor in self.processors()[1:]:
            record = processor(None, "warning", record)  # type: ignore[assignment]
        return str(record)


_logging: _Logging | None = None


def configure(log_format: Literal["console", "json"], level: str) -> None:
    """Sets up logging for the process. Lines are kept until `start`."""
    global _logging  # noqa: PLW0603  logging belongs to the process, as standard error does
    console = log_format == "console"
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(
            colors=bool(sys.stderr and sys.stderr.isatty()),
            exception_formatter=structlog.dev.plain_traceback,
        )
        if console
        else structlog.processors.JSONRenderer()
    )
    _logging = _Logging(renderer, console=console)
    writer = _logging.writer
    structlog.configure(
        processors=_logging.processors(),
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=lambda *_: Lines(writer),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_LibraryRecords()], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)
    log_uncaught(log)


def start() -> None:
    """Starts the threads of the log. Call it when privileges are dropped, which each thread has of
    its own."""
    if _logging:
        _logging.writer.start()
        _logging.native.start()


def close() -> None:
    """Writes what was logged last, for at most half a second, and gives descriptor 2 back. What is
    logged afterwards is lost. Safe to call twice."""
    global _logging  # noqa: PLW0603
    if _logging:
        _logging.native.close()
        _logging.tell_left_out(at_end=True)
        _logging.writer.close(_CLOSE_S)
        _logging = None


def say(text: str) -> None:
    """Writes TEXT to standard error as it is, for the person that starts the agent; for at most
    half a second. For before `configure` and after `close`."""
    writer = LogWriter(_STDERR, str)
    writer.put(text)
    writer.close(_CLOSE_S)


def lines_dropped() -> int:
    """How many lines of the log were dropped so far."""
    return _logging.writer.dropped if _logging else 0


def tell_left_out() -> None:
    """Logs how many refusals were left out since they were last told of. Call it every second."""
    if _logging:
        _logging.tell_left_out()


class _LibraryRecords(logging.Handler):
    """Hands what libraries log with the standard library's `logging` on."""

    def __init__(self) -> None:
        super().__init__()
        self._limit = RepeatLimit()

    def emit(self, record: logging.LogRecord) -> None:
        """Logs RECORD."""
        with suppress(Exception):  # such as arguments that do not fit the message
            left_out = self._limit.admit((record.name, record.levelno))
            if left_out is not None:
                more: Mapping[str, object] = {"left_out": left_out} if left_out else {}
                log.log(
                    record.levelno,
                    record.getMessage(),
                    logger=record.name,
                    exc_info=record.exc_info,
                    **more,
                )


class _NativeLines:
    """What is written to descriptor 2 by anything but the log: it becomes records.

    A pipe takes the descriptor's place, whose end is non-blocking, so that code which writes there
    does not wait for the log either. Where C code ends the process, its last words are lost with
    the pipe; Python's stack at that moment still goes to the descriptor itself.
    """

    def __init__(self) -> None:
        self._stderr = self._read_end = -1
        self._thread: threading.Thread | None = None
        self._limit = RepeatLimit(burst=_NATIVE_BURST)

    def start(self) -> None:
        """Takes the descriptor's place."""
        with suppress(OSError, RuntimeError):  # no descriptors or threads left: all stays as it was
            self._stderr = os.dup(_STDERR)
            self._read_end, write_end = os.pipe()
            os.set_blocking(write_end, False)
            thread = threading.Thread(target=self._run, name="standard error", daemon=True)
            thread.start()
            self._thread = thread
            os.dup2(write_end, _STDERR)
            os.close(write_end)
            faulthandler.enable(self._stderr)

    def close(self) -> None:
        """Gives the descriptor back, and logs what was written before."""
        if self._thread:
            faulthandler.disable()
            os.dup2(self._stderr, _STDERR)  # the pipe has no writer any more
            self._thread.join(_CLOSE_S)
            self._thread = None

    def _run(self) -> None:
        rest = b""
        while data := os.read(self._read_end, 1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > _MOST_NATIVE_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._tell(line)
        self._tell(rest)

    def _tell(self, line: bytes) -> None:
        text = line[:_MOST_NATIVE_LINE_BYTES].decode(errors="backslashreplace").strip()
        if text and (left_out := self._limit.admit("")) is not None:
            more: Mapping[str, object] = {"left_out": left_out} if left_out else {}
            log.warning("standard error", text=text, **more)


def _without_middle(text: str) -> str:
    half = _MOST_TEXT // 2
    return text if len(text) <= _MOST_TEXT else f"{text[:half]} [...] {text[-half:]}"


def _as_text(value: object) -> str:
    try:
        return value if isinstance(value, str) else repr(value)
    except Exception as error:  # noqa: BLE001  a value that cannot be shown is still logged
        return f"<{type(value).__name__}: {type(error).__name__}>"
