"""Structured logs on standard error: lines for people, or JSON for machines."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog

from coral.wire.text import safe_lines


def configure(log_format: Literal["console", "json"], level: str) -> None:
    """Sets up logging for the process."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _safe,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _safe(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Names of processes, services and peers give a terminal or a log's reader no orders."""
    return {key: _safe_value(value) for key, value in event.items()}


def _safe_value(value: object) -> object:
    if isinstance(value, str):
        return safe_lines(value)
    if isinstance(value, list | tuple):
        return [_safe_value(item) for item in value]
    return value
