"""The colony's process: start up, follow agents until a signal, store the rest, end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import structlog

from coral.colony import logs
from coral.colony.agents import connecting, sources
from coral.colony.config import Config, ConfigError, load
from coral.colony.follow.discovery.addresses import host_and_port, joined
from coral.colony.follow.fleet import Fleet
from coral.colony.monitoring import Lag, following_families, lag_families, pages
from coral.colony.pages import Pages, serving

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_EXIT_FAILED: Final = 1
_EXIT_CONFIG: Final = 2


def main(config_path: Path | None, flags: dict[str, object]) -> int:
    """Runs the colony; its exit status."""
    try:
        config = load(config_path, flags)
        logs.configure(config.log_format, config.log_level)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(config))
    except ConfigError as error:
        logs.say(f"coral colony: {error}")
        return _EXIT_CONFIG
    except Exception:
        log.exception("the colony failed unexpectedly")
        return _EXIT_FAILED
    return 0
