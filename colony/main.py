"""The colony's process: start up, follow agents until a signal, store the rest, end."""

from __future__ import annotations

import asyncio
import os
import resource
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
from coral.colony.store.errors import StoreError
from coral.colony.store.figures import State, families
from coral.colony.store.store import Store
from coral.colony.tables import ContractRows

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_EXIT_FAILED: Final = 1
_EXIT_CONFIG: Final = 2


def main(config_path: Path | None, flags: dict[str, object]) -> int:
    """Runs the colony; its exit status."""
    try:
        config = load(config_path, flags)
        logs.configure(config.log_format, config.log_level)
        _allow_connections()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(config))
    except ConfigError as error:
        logs.say(f"coral colony: {error}")
        return _EXIT_CONFIG
    except Exception:
        log.exception("the colony failed unexpectedly")
        return _EXIT_FAILED
    return 0


def _allow_connections() -> None:
    """Each agent takes a descriptor; many systems allow 1,024 until a process asks for more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop  # noqa: PLC0415  it does not exist for every platform
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def _serve(config: Config) -> None:
    stopping = _stop_on_signal()
    async with AsyncExitStack() as stack:
        store = await _opened(stack, config)
        fleet = _fleet(store, config)
        lag = Lag()
        measuring = asyncio.ensure_future(lag.run())
        stack.callback(measuring.cancel)
        metrics = await _serve_pages(
            stack,
            config,
            pages(
                (
                    lambda: following_families(fleet),
                    lambda: families(store.figures),
                    lambda: lag_families(lag),
                ),
                {"agents": lambda: _why_unsettled(fleet), "store": lambda: _why_idle(store)},
            ),
        )
        log.info("listening", data=config.data, metrics=metrics or None)
        await stack.enter_async_context(fleet.following())
        await stopping
        log.info("stopping")
    log.info("stopped")


async def _opened(stack: AsyncExitStack, config: Config) -> Store:
    store = Store(Path(config.data), config.storage.as_settings(), ContractRows())
    try:
        await store.start()
    except (StoreError, OSError) as error:
        raise ConfigError(f"data: {config.data}: {error}") from error
    stack.push_async_callback(store.close)
    return store


def _fleet(store: Store, config: Config) -> Fleet:
    found = sources(config.agents)
    if not found:
        log.warning("no agents are configured: see agents.addresses, or --agents")
    return Fleet(
        store,
        found,
        connecting(config.agents),
        wanted=[rule.as_wanted() for rule in config.collect],
        connecting=config.agents.connecting,
        lost_after_s=config.agents.lost_after,
    )


async def _serve_pages(stack: AsyncExitStack, config: Config, made: Pages) -> str:
    """Where they are served. Raises `ConfigError`."""
    if not config.metrics:
        return ""
    host, port = host_and_port(config.metrics)
    try:
        port = await stack.enter_async_context(serving(host, port, made))
    except OSError as error:
        raise ConfigError(f"metrics: {config.metrics}: {error.strerror or error}") from error
    return joined(host, port)


def _why_unsettled(fleet: Fleet) -> str:
    return "" if fleet.is_settled else "not all have been found and tried yet"


def _why_idle(store: Store) -> str:
    figures = store.figures
    return "" if figures.state is State.STORING else f"{figures.state}: {figures.detail}"


def _stop_on_signal() -> asyncio.Future[None]:
    """A future that the first signal completes. A second one ends the process at once: what has
    been stored is whole then, too, and agents are asked again for the rest."""
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[None] = loop.create_future()

    def on_signal(number: int) -> None:
        if stopping.done():
            os._exit(128 + number)
        stopping.set_result(None)

    for number in _SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN and number == signal.SIGHUP:
            continue  # by nohup
        loop.add_signal_handler(number, on_signal, number)
    return stopping
