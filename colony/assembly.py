"""The parts of a colony, as its configuration wants them: what follows, what carries, what stores,
what exports; and what each of them has to say to monitoring."""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from coral.colony.agents import connecting, sources
from coral.colony.bus.connection import BusError
from coral.colony.bus.consumer import Consumer
from coral.colony.bus.publisher import Publisher
from coral.colony.config import Config, ConfigError
from coral.colony.export.exporter import Exporter
from coral.colony.follow.fleet import Fleet
from coral.colony.follow.sink import Sink
from coral.colony.monitoring import Families, Obstacle, following_families
from coral.colony.monitoring_bus import exported, published, read
from coral.colony.store.errors import StoreError
from coral.colony.store.figures import State, families
from coral.colony.store.store import Store
from coral.colony.tables import ContractRows

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

Running = Callable[[], Coroutine[Any, Any, None]]

PUBLISH: Final = "publish"
STORE: Final = "store"


@dataclass
class Parts:
    """A colony's. `running` are to run until it ends; `follows` says whether the fleet does."""

    fleet: Fleet
    store: Store | None
    follows: bool
    families: list[Families]
    obstacles: dict[str, Obstacle]
    running: Mapping[str, Running] = field(default_factory=dict)


async def assembled(stack: AsyncExitStack, config: Config) -> Parts:
    """The parts, opened; STACK closes them, the last one first. Raises `ConfigError`."""
    if config.bus.mode == PUBLISH:
        return await _publishing(stack, config)
    return await _storing(stack, config)


async def _publishing(stack: AsyncExitStack, config: Config) -> Parts:
    publisher = Publisher(config.bus.as_settings())
    try:
        await publisher.start()
    except (BusError, OSError) as error:
        raise ConfigError(f"bus: {error}") from error
    stack.push_async_callback(publisher.close)
    fleet = _fleet(publisher, config, alone=False)
    return Parts(
        fleet,
        None,
        follows=True,
        families=[
            lambda: following_families(fleet),
            lambda: published(publisher),
        ],
        obstacles={
            "agents": lambda: _why_unsettled(fleet),
            "bus": lambda: _why_down(publisher),
        },
        running={"bus": publisher.run},
    )


async def _storing(stack: AsyncExitStack, config: Config) -> Parts:
    running: dict[str, Running] = {}
    exporter = _exporter(config)
    store = Store(
        Path(config.data),
        config.storage.as_settings(),
        ContractRows(),
        exporter.observe if exporter else None,
    )
    try:
        await store.start()
    except (StoreError, OSError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ConfigError(f"data: {config.data}: {reason}") from error
    stack.push_async_callback(store.close)
    running["store"] = store.run
    made: list[Families] = [lambda: families(store.figures)]
    obstacles: dict[str, Obstacle] = {"store": lambda: _why_idle(store)}
    if exporter:
        running["export"] = exporter.run
        made.append(lambda: exported(exporter))
    follows = config.bus.mode != STORE
    fleet = _fleet(store, config) if follows else Fleet(store, (), connecting(config.agents))
    if follows:
        made.append(lambda: following_families(fleet))
        obstacles["agents"] = lambda: _why_unsettled(fleet)
    else:
        consumer = Consumer(config.bus.as_settings(), store)
        running["bus"] = consumer.run
        made.append(lambda: read(consumer))
        obstacles["bus"] = lambda: _why_down(consumer)
    return Parts(fleet, store, follows, made, obstacles, running)


def _fleet(sink: Sink, config: Config, *, alone: bool = True) -> Fleet:
    found = sources(config.agents)
    if not found:
        log.warning("no agents are configured: see agents.addresses, or --agents")
    return Fleet(
        sink,
        found,
        connecting(config.agents),
        wanted=[rule.as_wanted() for rule in config.collect],
        connecting=config.agents.connecting,
        lost_after_s=config.agents.lost_after,
        alone=alone,
    )


def _exporter(config: Config) -> Exporter | None:
    if not config.export.is_on:
        return None
    try:
        return Exporter(config.export.as_settings(config.name or socket.gethostname()))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _why_unsettled(fleet: Fleet) -> str:
    return "" if fleet.is_settled else "not all have been found and tried yet"


def _why_down(bus: Publisher | Consumer) -> str:
    return "" if bus.is_up else "no server answers"


def _why_idle(store: Store) -> str:
    figures = store.figures
    return "" if figures.state is State.STORING else f"{figures.state}: {figures.detail}"
