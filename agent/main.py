"""The agent's process: start up, serve until a signal, shut down."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from coral.agent import logs
from coral.agent.access import exposure
from coral.agent.access.access import Access
from coral.agent.access.audit import Audit
from coral.agent.access.kubernetes import Reviews
from coral.agent.access.sinks import audit_sinks
from coral.agent.access.tokens import Tokens
from coral.agent.config import Config, ConfigError, load
from coral.agent.machine import privileges
from coral.agent.notify import Notifier
from coral.agent.serving import monitoring
from coral.agent.serving.counts import Counts
from coral.agent.serving.health import Readiness
from coral.agent.serving.prometheus import Registry
from coral.agent.serving.rotation import Rotation, read_tls
from coral.agent.serving.server import Server
from coral.agent.serving.web_guard import WebGuard, read_guard
from coral.agent.sessions.supervisor import Supervisor
from coral.bpf.loading import bcc, signed
from coral.collectors.cgroups import cgroup_directory
from coral.collectors.options import OptionError
from coral.collectors.registry import COLLECTORS
from coral.wire.kinds import kind_name

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.agent")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_EXIT_FAILED: Final = 1
_EXIT_CONFIG: Final = 2
# From the first signal to the end of the orderly shutdown, whatever the agent's clients do. The log
# then has half a second to be written, so the process ends within two. gRPC alone took 0.8 s to end
# 700 streams.
_END_WITHIN_S: Final = 1.4
_SPARE_THREADS: Final = 4  # what no session does, such as probing the kernel


# mallopt(3): the most arenas that glibc makes, and the most free memory at the end of one.
_M_ARENA_MAX: Final = -8
_M_TRIM_THRESHOLD: Final = -1
_TRIM_THRESHOLD_BYTES: Final = 128 << 10


def main(config_path: Path | None, flags: dict[str, object]) -> int:
    """Runs the agent. Ends the process after an orderly end; otherwise returns its exit status."""
    _keep_little_memory()
    try:
        config = load(config_path, flags=flags)
        signed.check_environment()
        logs.configure(config.log_format, config.log_level)
        # Before root is given up: only root may be able to read and write these files.
        tokens, sinks = Tokens(config.auth), audit_sinks(config.audit)
        secrets = _Secrets(tokens, read_tls(config), read_guard(config))
        kept = _settle(config)
        logs.start()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(config, secrets, Audit(config.name, sinks), kept))
        # asyncio leaves Python's own handler behind, which would print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    except (ConfigError, signed.UnsignedError) as error:
        logs.close()
        logs.say(f"coral agent: {error}")
        return _EXIT_CONFIG
    except Exception:
        log.exception("the agent failed unexpectedly")
        return _EXIT_FAILED
    finally:
        logs.close()
    # Taking the interpreter down takes half a second, and longer where gRPC waits once more.
    os._exit(0)


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
    """Drops the capabilities that no collector needs or wants that this agent may start."""
    allowed = config.policy.collectors
    return privileges.settle(
        config,
        [
            {**collector.wants(), **collector.needs()}
            for kind, collector in COLLECTORS.items()
            if not allowed or kind_name(kind) in allowed
        ],
    )


@dataclass(frozen=True, slots=True)
class _Secrets:
    """What was read before root was given up."""

    tokens: Tokens
    tls: Rotation | None
    guard: WebGuard | None


async def _serve(config: Config, secrets: _Secrets, audit: Audit, kept: frozenset[str]) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_threads(config), "coral"))
    signalled, stopped = threading.Event(), threading.Event()
    # It starts now: after the signal there may be no room for a thread.
    threading.Thread(target=_end_in_time, args=(signalled, stopped), daemon=True).start()
    stopping = _stop_on_signal(signalled)
    async with AsyncExitStack() as stack:
        notifier = Notifier()
        stack.callback(notifier.close)
        stack.callback(audit.close)
        reviews = _reviews(config)
        access = Access(config, reviews, audit)
        supervisor = await stack.enter_async_context(Supervisor(config, access))
        readiness, counts = Readiness(supervisor), Counts()
        metrics, health = stack.enter_context(
            monitoring.serve(config, supervisor, readiness, counts, secrets.guard)
        )
        await _export(stack, supervisor, counts)
        server = await stack.enter_async_context(
            Server(supervisor, config, secrets.tokens, reviews, counts, tls=secrets.tls)
        )
        for watched in (secrets.tls, secrets.guard):
            if watched:
                counts.tls[watched.listener] = watched.counts
                await stack.enter_async_context(watched.kept_up())
        await stack.enter_async_context(readiness.kept_up(server, notifier))
        log.info("privileges", uid=os.geteuid(), capabilities=sorted(kept))
        log.info(
            "listening", agent=config.name, grpc=server.addresses, metrics=metrics or None,
            **({"health": health} if health else {}),
        )  # fmt: skip
        for warning in exposure.warnings(config, access):
            log.warning("others may use this agent", problem=warning)
        await _report_capabilities(supervisor)
        readiness.set_probed()
        await stopping
        bcc.stop()
        log.info("stopping", sessions=len(supervisor.sessions))
    log.info("stopped")
    stopped.set()


def _reviews(config: Config) -> Reviews | None:
    """What asks Kubernetes about callers, where the configuration says at which server."""
    kubernetes = config.auth.kubernetes
    if not kubernetes.server:
        return None
    from coral.agent.access.kubernetes_api import (  # noqa: PLC0415  memory that few want to spend
        ApiServer,
    )

    return Reviews(ApiServer(kubernetes).post, kubernetes.audience)


async def _export(stack: AsyncExitStack, supervisor: Supervisor, counts: Counts) -> None:
    """Exports by OTLP, where the configuration names a receiver."""
    config = supervisor.config
    if not config.otlp.endpoint:
        return
    from coral.agent.otlp.exporter import Exporter  # noqa: PLC0415  memory that few want to spend

    registry = Registry(supervisor, counts)
    exporter = Exporter(config.otlp, config.name, registry, counts.exported)
    supervisor.observers.append((await stack.enter_async_context(exporter)).observe)


def _threads(config: Config) -> int:
    """The threads that load and drain: one for each session, which never uses two at once, so that
    a session that loads slowly does not delay the drains of others."""
    return config.limits.concurrent_collectors + len(config.continuous) + _SPARE_THREADS


def _stop_on_signal(signalled: threading.Event) -> asyncio.Future[None]:
    """A future that the first signal completes; it sets SIGNALLED too. A second signal ends the
    process at once; nothing stays attached then either, because the kernel detaches the links of a
    process that ends."""
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[None] = loop.create_future()

    def on_signal(number: int) -> None:
        if stopping.done():
            os._exit(128 + number)
        stopping.set_result(None)
        signalled.set()

    for number in _SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN and number == signal.SIGHUP:
            continue  # by nohup
        loop.add_signal_handler(number, on_signal, number)
    return stopping


def _end_in_time(signalled: threading.Event, stopped: threading.Event) -> None:
    """Ends the process a while after the signal, if it is still there. gRPC waits, in its own
    shutdown and again at the interpreter's end, for connections whose clients read nothing."""
    signalled.wait()
    time.sleep(_END_WITHIN_S)
    if not stopped.is_set():
        log.warning("stopped", reason=f"something still had to be closed after {_END_WITHIN_S:g}s")
    logs.close()
    os._exit(0)


async def _report_capabilities(supervisor: Supervisor) -> None:
    for name, support in (await supervisor.capabilities()).items():
        if support.supported:
            log.info("collector available", kind=name, hook=support.hook)
        else:
            log.warning("collector not possible here", kind=name, reason=support.reason)
    features = await supervisor.features()
    if not (features.obstacle or (statistics := features["run_time_stats"]).available):
        log.warning(
            "no run time of programs: limits.cpu_percent covers only what runs in the agent",
            reason=statistics.reason,
        )
    for name in supervisor.config.policy.collectors:
        if name not in {kind_name(kind) for kind in supervisor.measures}:
            log.warning("policy.collectors names a collector that this agent lacks", kind=name)
    for path in supervisor.config.policy.cgroups:
        try:
            cgroup_directory(path)
        except OptionError as error:
            reason = f"{path!r} is not accepted; give {error.accepts}"
            log.warning("policy.cgroups names a cgroup that is not there now", reason=reason)
