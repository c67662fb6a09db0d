"""The agent's process: start up, serve until a signal, shut down."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import structlog

from coral.agent import logs
from coral.agent.config import Config, ConfigError, load
from coral.agent.machine import privileges
from coral.agent.notify import Notifier
from coral.agent.serving import monitoring
from coral.agent.serving.caller import read_token
from coral.agent.serving.health import Readiness
from coral.agent.serving.server import Server
from coral.agent.sessions.supervisor import Supervisor
from coral.collectors.registry import COLLECTORS
from coral.wire.kinds import kind_name

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.agent")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_EXIT_FAILED: Final = 1
_EXIT_CONFIG: Final = 2


# mallopt(3): the most arenas that glibc makes, and the most free memory at the end of one.
_M_ARENA_MAX: Final = -8
_M_TRIM_THRESHOLD: Final = -1
_TRIM_THRESHOLD_BYTES: Final = 128 << 10


def main(config_path: Path | None, flags: dict[str, object]) -> int:
    """Runs the agent; returns the process's exit status."""
    _keep_little_memory()
    try:
        config = load(config_path, flags=flags)
        logs.configure(config.log_format, config.log_level)
        token = read_token(config)  # before root is given up: only root may be able to read it
        kept = _settle(config)
        logs.start()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(config, token, kept))
    except ConfigError as error:
        logs.close()
        logs.say(f"coral agent: {error}")
        return _EXIT_CONFIG
    except Exception:
        log.exception("the agent failed unexpectedly")
        return _EXIT_FAILED
    finally:
        logs.close()
    return 0


def _keep_little_memory() -> None:
    """Makes glibc return what libbpf frees after it has read the kernel's BTF in a thread.

    Only the main arena returns memory, so all threads share it; they hold the interpreter's lock
    and do not compete for it. The trim threshold is fixed, because freeing that BTF would raise it
    to megabytes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop  # noqa: PLC0415  it does not exist for every platform
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def _settle(config: Config) -> frozenset[str]:
    """Drops the capabilities that none of the collectors needs that this agent may start."""
    allowed = config.policy.collectors
    return privileges.settle(
        config,
        [
            collector.needs()
            for kind, collector in COLLECTORS.items()
            if not allowed or kind_name(kind) in allowed
        ],
    )


async def _serve(config: Config, token: str, kept: frozenset[str]) -> None:
    stopping = _stop_on_signal()
    async with AsyncExitStack() as stack:
        notifier = Notifier()
        stack.callback(notifier.close)
        supervisor = await stack.enter_async_context(Supervisor(config))
        readiness = Readiness(supervisor)
        metrics_address = stack.enter_context(
            monitoring.serve(config.metrics, supervisor, readiness)
        )
        server = await stack.enter_async_context(Server(supervisor, config, token))
        await stack.enter_async_context(readiness.kept_up(server.health, notifier))
        log.info("privileges", uid=os.geteuid(), capabilities=sorted(kept))
        log.info(
            "listening", agent=config.name, grpc=server.addresses, metrics=metrics_address or None
        )
        await _report_capabilities(supervisor)
        await stopping
        log.info("stopping", sessions=len(supervisor.sessions))
    log.info("stopped")


def _stop_on_signal() -> asyncio.Future[None]:
    """A future that the first signal completes. A second signal ends the process at once; nothing
    stays attached then either, because the kernel detaches the links of a process that ends."""
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[None] = loop.create_future()

    def on_signal(number: int) -> None:
        if stopping.done():
            os._exit(128 + number)
        stopping.set_result(None)

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    return stopping


async def _report_capabilities(supervisor: Supervisor) -> None:
    for name, support in (await supervisor.capabilities()).items():
        if support.supported:
            log.info("collector available", kind=name, hook=support.hook)
        else:
            log.warning("collector not possible here", kind=name, reason=support.reason)
    features = await supervisor.features()
    if not (features.obstacle or (statistics := features["run_time_stats"]).available):
        log.warning(
            "no run time of programs: limits.cpu_percent covers the agent's own CPU time only",
            reason=statistics.reason,
        )
    for name in supervisor.config.policy.collectors:
        if name not in {kind_name(kind) for kind in supervisor.measures}:
            log.warning("policy.collectors names a collector that this agent lacks", kind=name)
