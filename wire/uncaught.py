"""What Python writes to standard error by itself when nobody catches an exception becomes records:
a descriptor that nobody reads would hold up whichever thread it happens in."""

from __future__ import annotations

import sys
import threading

import structlog


def log_uncaught(log: structlog.stdlib.BoundLogger) -> None:
    """Makes LOG tell of exceptions that end a thread, and of those in finalizers."""

    def on_thread_exception(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value and not isinstance(arguments.exc_value, SystemExit):
            thread = arguments.thread.name if arguments.thread else ""
            log.error("thread failed", thread=thread, exc_info=arguments.exc_value)

    def on_unraisable(arguments: sys.UnraisableHookArgs) -> None:
        # Not the object: a finalizer may have left it half destroyed.
        log.error(arguments.err_msg or "exception ignored", exc_info=arguments.exc_value)

    threading.excepthook = on_thread_exception
    sys.unraisablehook = on_unraisable
