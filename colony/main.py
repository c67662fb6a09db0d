"""The colony's process: start up, follow agents until a signal, store the rest, end."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import structlog

from coral.colony import logs
from coral.colony.answers.elsewhere import FollowsNobody, StoresNothing
from coral.colony.answers.server import Answers, ServingError, check
from coral.colony.assembly import Parts, Running, assembled
from coral.colony.config import Config, ConfigError, load
from coral.colony.delivery import EndedError
from coral.colony.follow.discovery.addresses import host_and_port, joined
from coral.colony.monitoring import Lag, build_info, lag_families, log_families, pages
from coral.colony.pages import Pages, serving

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_EXIT_FAILED: Final = 1
_EXIT_CONFIG: Final = 2
_CANCEL_AGAIN_S: Final = 0.2
# Objects that are on their way from a thousand agents into a transaction are below this number;
# then only what is left in cycles makes the collector look.
_GC_OBJECTS: Final = 100_000
_M_ARENA_MAX: Final = -8  # of mallopt(3)


def main(config_path: Path | None, flags: dict[str, object]) -> int:
    """Runs the colony; its exit status."""
    try:
        config = load(config_path, flags)
        logs.configure(config.log_format, config.log_level)
        _check_addresses(config, flags)
        _allow_connections()
        _collect_seldom()
        _share_one_arena()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(config))
    except ConfigError as error:
        logs.say(f"coral colony: {error}")
        return _EXIT_CONFIG
    except Exception as error:
        if isinstance(error, EndedError):
            log.error("the colony ends", reason=str(error))
        elif isinstance(error, ExceptionGroup) and not error.split(EndedError)[1]:
            log.error("the colony ends", reason="its store takes no more")  # which has said why
        else:
            log.exception("the colony failed unexpectedly")
        return _EXIT_FAILED
    finally:
        logs.close()
    return 0


def _check_addresses(config: Config, flags: Mapping[str, object]) -> None:
    """Before anything is opened. Raises `ConfigError`."""
    try:
        check(config.as_serving())
    except ServingError as error:
        source = "--listen: " if "listen" in flags and str(error).startswith("listen") else ""
        raise ConfigError(f"{source}{error}") from error


def _allow_connections() -> None:
    """Each agent takes a descriptor; many systems allow 1,024 until a process asks for more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _collect_seldom() -> None:
    """Python looks at all objects when those that are new and alive have become a quarter more:
    with a thousand agents several times while they are connected to, and every few seconds after
    that, for 0.2 s each time, in which the loop stands still."""
    gc.freeze()
    gc.set_threshold(_GC_OBJECTS, *gc.get_threshold()[1:])


def _share_one_arena() -> None:
    """Makes glibc use again what another thread has freed: what rows pass through is allocated in
    one thread, and freed in the next."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_ARENA_MAX, 1)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop  # noqa: PLC0415  it does not exist for every platform
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def _serve(config: Config) -> None:
    stopping = _stop_on_signal()
    log.info("starting", bus=config.bus.mode)
    async with AsyncExitStack() as stack:
        lag = Lag()
        await stack.enter_async_context(_running({"lag": lag.run}, stopping))
        if not (parts := await _unless_stopped(stopping, assembled(stack, config))):
            return
        addresses = await _serve_answers(stack, config, parts)
        build = build_info()
        makers = (
            *parts.families, lambda: lag_families(lag),
            lambda: log_families(logs.lines_dropped()), lambda: (build,),
        )  # fmt: skip
        metrics = await _serve_pages(stack, config, pages(makers, parts.obstacles))
        log.info(
            "listening", grpc=addresses, metrics=metrics or None,
            **({"data": config.data} if parts.store else {}),
        )  # fmt: skip
        await stack.enter_async_context(_running(parts.running, stopping))
        if parts.follows:
            await stack.enter_async_context(parts.fleet.following())
        await stopping
        log.info("stopping")
    log.info("stopped")


async def _unless_stopped(
    stopping: asyncio.Future[None], starting: Coroutine[Any, Any, Parts]
) -> Parts | None:
    """What STARTING returns; None where a signal comes first. What it has opened by then is
    closed."""
    task = asyncio.ensure_future(starting)
    await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        return task.result()
    while not task.done():  # a library may take a cancellation for one of its own
        task.cancel()
        await asyncio.wait([task], timeout=_CANCEL_AGAIN_S)
    if not task.cancelled():
        task.exception()  # which does not matter any more
    return None


@asynccontextmanager
async def _running(
    named: Mapping[str, Running], stopping: asyncio.Future[None]
) -> AsyncIterator[None]:
    """Runs each for the duration of the block. One that fails ends the colony."""

    def over(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and not stopping.done():
            stopping.set_exception(error)

    tasks = [asyncio.create_task(each(), name=name) for name, each in named.items()]
    for task in tasks:
        task.add_done_callback(over)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _serve_answers(stack: AsyncExitStack, config: Config, parts: Parts) -> list[str]:
    """Where they are served. Raises `ConfigError`."""
    store = parts.store or StoresNothing()
    fleet = parts.fleet if parts.follows else FollowsNobody()
    try:
        answers = Answers(store, fleet, config.as_serving())
        return await stack.enter_async_context(answers.serving())
    except ValueError as error:
        raise ConfigError(str(error)) from error


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
