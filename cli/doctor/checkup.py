"""The checks of `coral doctor`: each examines one property of an agent and says what it found.

The agent's answers about the kernel are taken as they are. Whether its collectors really see
something, and leave nothing behind, is tested.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import grpc

from coral.cli.common import in_users_words
from coral.cli.doctor.machine import AgentProcess
from coral.cli.doctor.provoke import UNKNOWN, Patient
from coral.cli.ladder import refusals, taken
from coral.client import (
    AgentClient,
    AgentError,
    Batch,
    Capabilities,
    CollectorCapability,
    EndReason,
    SessionEnd,
)
from coral.views.contract import Provocation
from coral.views.registry import VIEWS
from coral.wire.kinds import kind_name

_ANSWER_S: Final = 15.0
_EVENTS_S: Final = 10.0
_STOP_S: Final = 2.0
_LEASE_S: Final = 60.0
_UNCOUNTED_SINCE: Final = (5, 11)  # Linux, of maps against the limit of locked memory
_NOT_OURS: Final = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED)
_NEEDED: Final = {
    "CAP_BPF": "load programs",
    "CAP_PERFMON": "see other processes",
}


class Status(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"  # it works, but less well, or not for a reason of this machine
    FAIL = "FAIL"


@dataclass(frozen=True)
class Check:
    """One property that was examined. `found` is the result; where that is bad, why, and what to
    do."""

    name: str
    status: Status
    found: str


async def examine(
    address: str, process: AgentProcess | None, about: str, *, private: bool
) -> AsyncGenerator[Check, None]:
    """Every check of the agent at ADDRESS, as soon as it is done. ABOUT says where the agent comes
    from; a PRIVATE one has no other collectors."""
    async with AgentClient(address) as agent:
        try:
            async with asyncio.timeout(_ANSWER_S):
                answer = await agent.capabilities()
        except AgentError as error:
            yield Check("agent", Status.FAIL, in_users_words(str(error), {}))
            return
        except TimeoutError:
            text = f"nothing answers at {address} within {_ANSWER_S:g} s: restart that agent"
            yield Check("agent", Status.FAIL, text)
            return
        yield Check("agent", Status.OK, f"{answer.agent_version}, {about}")
        warnings = (Check("configuration", Status.WARN, text) for text in answer.warnings)
        for check in (*warnings, *_kernel(answer), *_pods(answer)):
            yield check
        if process:
            for check in _process(process, answer.kernel_version):
                yield check
        if not answer.features:
            return  # eBPF cannot be used at all
        for collector in answer.collectors:
            async for check in _collector(agent, collector):
                yield check
        if not answer.available_collectors:
            yield Check("collectors", Status.FAIL, "none can run here")
            return
        yield await _left_behind(agent, process, private=private)


def _kernel(answer: Capabilities) -> Iterator[Check]:
    """What the agent says about the kernel, and about its loaders of programs."""
    if answer.features:
        yield Check("kernel", Status.OK, answer.kernel_version)
    else:
        yield Check("eBPF", Status.FAIL, answer.unsupported_reason)
    if answer.libbpf_version:
        yield Check("libbpf", Status.OK, answer.libbpf_version)
    features = {feature.name: feature for feature in answer.features}
    btf, bcc = features.get("btf"), features.get("bcc")
    if btf:
        yield _has("BTF", btf.available, "the kernel describes its types", btf.reason)
    if btf and bcc:
        loaders = [name for name, it in (("core", btf), ("bcc", bcc)) if it.available]
        why_none = f"none: core: {btf.reason}; bcc: {bcc.reason}"
        yield _has("loaders", bool(loaders), " and ".join(loaders), why_none)


def _pods(answer: Capabilities) -> Iterator[Check]:
    """What the agent knows of pods. A machine need not be a node of Kubernetes: nothing is wrong
    where no source of names is there, unless it was configured."""
    for source in answer.pod_sources:
        found = source.detail if source.used else f"not used: {source.detail}"
        late = source.name in ("cgroup paths", "cgroup changes") and not source.used
        yield Check(f"pods: {source.name}", Status.WARN if late else Status.OK, found)


def _has(name: str, there: bool, found: str, reason: str) -> Check:
    return Check(name, Status.OK, found) if there else Check(name, Status.WARN, reason)


def _process(process: AgentProcess, release: str) -> Iterator[Check]:
    """What /proc says about the agent: a check for each file that may be read."""
    checks: tuple[Callable[[], Check], ...] = (
        lambda: _capabilities(process),
        lambda: _locked_memory(process, release),
        lambda: _mounted(process, "cgroup2", "/sys/fs/cgroup", "the option `cgroup` needs it"),
    )
    for check in checks:
        try:
            yield check()
        except OSError as error:
            found = f"/proc/{process.pid} cannot be read: {error.strerror}: run this as root"
            yield Check("process", Status.WARN, found)
            return


def _capabilities(process: AgentProcess) -> Check:
    has = process.capabilities()
    missing = {} if "CAP_SYS_ADMIN" in has else {n: w for n, w in _NEEDED.items() if n not in has}
    if missing:
        what = "; ".join(f"no {name}, to {why}" for name, why in missing.items())
        found = f"{what}: run the agent as root, or give it {' and '.join(missing)}"
        return Check("capabilities", Status.WARN, found)
    return Check("capabilities", Status.OK, ", ".join(sorted(has)))


def _locked_memory(process: AgentProcess, release: str) -> Check:
    numbers = re.match(r"(\d+)\.(\d+)", release)
    limit = process.locked_memory_bytes()
    text = "unlimited" if limit is None else f"{limit >> 10} KiB"
    if numbers and (int(numbers[1]), int(numbers[2])) >= _UNCOUNTED_SINCE:
        return Check(
            "locked memory", Status.OK, f"{text}; since Linux 5.11 maps do not count against it"
        )
    if limit is None:
        return Check("locked memory", Status.OK, text)
    found = (
        f"{text}, and maps count against it: raise it with `ulimit -l unlimited` or LimitMEMLOCK="
    )
    return Check("locked memory", Status.WARN, found)


def _mounted(process: AgentProcess, kind: str, usual: str, why: str) -> Check:
    if where := process.mount_point(kind):
        return Check(kind, Status.OK, f"mounted at {where}")
    return Check(kind, Status.WARN, f"not mounted, and {why}: mount -t {kind} {kind} {usual}")


async def _collector(agent: AgentClient, collector: CollectorCapability) -> AsyncIterator[Check]:
    name = kind_name(collector.kind)
    if not collector.supported:
        yield Check(name, Status.WARN, f"cannot run here: {collector.reason}")
        return
    yield Check(name, Status.OK, taken(collector))
    for what, why in refusals(collector):
        yield Check(f"{name}: {what}", Status.WARN, why)
    for mode in _modes(collector):
        yield await _at_work(agent, collector.kind, mode)


def _modes(collector: CollectorCapability) -> list[str]:
    """The values of its option `mode` that work here; an empty one where it has no such option."""
    for option in collector.options:
        if option.name == "mode":
            return [option.default_value] if option.refused else option.accepts.split(" or ")
    return [""]


async def _at_work(agent: AgentClient, kind: int, mode: str) -> Check:
    """Starts it on a process of the doctor's own, has that run a known workload, and counts what
    the collector reports."""
    name = f"{kind_name(kind)}, {mode}" if mode else kind_name(kind)
    view = VIEWS.get(kind)
    provocation = (view and view.provocation) or UNKNOWN
    async with Patient(provocation.code) as patient:
        config = {"pid": str(patient.pid), **provocation.config, **({"mode": mode} if mode else {})}
        try:
            async with asyncio.timeout(_ANSWER_S + _EVENTS_S):
                started = await agent.start(kind, config=config, duration_s=_LEASE_S)
                if not started.supported:
                    return Check(name, Status.FAIL, started.error)
                watch = _Watch(provocation)
                try:
                    await watch.run(agent, started.collector_id, patient.begin)
                finally:
                    # It has ended already, unless something went wrong.
                    with suppress(AgentError, TimeoutError):
                        async with asyncio.timeout(_STOP_S):
                            await agent.stop(started.collector_id)
        except AgentError as error:
            status = Status.WARN if error.code in _NOT_OURS else Status.FAIL
            return Check(name, status, in_users_words(str(error), {"kind": kind_name(kind)}))
        except TimeoutError:
            return Check(name, Status.FAIL, "the agent stopped answering: look at its log")
    return watch.verdict(name)


class _Watch:
    """One subscription of a collector, and what has come so far."""

    def __init__(self, provocation: Provocation) -> None:
        self._provocation = provocation
        self._seen = 0
        self._lost: Counter[str] = Counter()
        self._end: SessionEnd | None = None
        self._enough = asyncio.Event()
        self._first_s = 0.0

    async def run(self, agent: AgentClient, collector_id: str, begin: Callable[[], None]) -> None:
        """Subscribes, calls BEGIN, reads until everything has come or the time is up, stops the
        collector, and reads to its end."""
        async with agent.subscribe(collector_id) as batches:
            reading = asyncio.create_task(self._read(batches))
            begin()
            try:
                with suppress(TimeoutError):  # the verdict says so
                    async with asyncio.timeout(_EVENTS_S):
                        await self._enough.wait()
                if not self._end:
                    await agent.stop(collector_id)
                await reading
            finally:
                reading.cancel()

    async def _read(self, batches: AsyncIterator[Batch]) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            self._look()
            async for batch in batches:
                self._seen += self._provocation.count(batch)
                self._lost.update(batch.lost)
                self._end = batch.end
                if self._seen and not self._first_s:
                    self._first_s = loop.time() - began
                self._look()
        finally:
            self._enough.set()

    def _look(self) -> None:
        if self._seen >= self._provocation.times:
            self._enough.set()

    def verdict(self, name: str) -> Check:
        """The result."""
        wanted, things = self._provocation.times, self._provocation.things
        exact = self._provocation.exact
        enough = self._seen == wanted if exact else self._seen >= wanted
        of = f"{self._seen:,} of {'' if exact else 'at least '}{wanted:,} {things}"
        found = f"{of}, the first after {self._first_s:.3f} s"
        if not wanted:
            found = "starts and stops; there is no known workload for it"
        elif not enough:
            lost = ", ".join(f"{count} lost ({stage})" for stage, count in self._lost.items())
            found = f"{of}{lost and '; '}{lost}: see the agent's log"
            return Check(name, Status.FAIL, found)
        if not self._end or self._end.reason != EndReason.STOPPED:
            detail = self._end.detail if self._end else "the agent went away"
            return Check(
                name, Status.FAIL, f"{found}, but it did not end when it was stopped: {detail}"
            )
        return Check(name, Status.OK, found)


async def _left_behind(agent: AgentClient, process: AgentProcess | None, *, private: bool) -> Check:
    """Whether the checks have left anything behind."""
    name = "left behind"
    try:
        async with asyncio.timeout(_ANSWER_S):
            at_work = [it.collector_id for it in (await agent.collectors()).collectors]
        if at_work and not private:
            return Check(name, Status.OK, "not checked: other users' collectors are running")
        if at_work:
            return Check(name, Status.FAIL, f"collectors {', '.join(at_work)}: see the agent's log")
        held = process.held() if process else {}
    except (AgentError, OSError, TimeoutError) as error:
        return Check(name, Status.WARN, f"cannot be checked: {error}")
    if held:
        text = ", ".join(f"{count} {kind}" for kind, count in held.items())
        return Check(name, Status.FAIL, f"the agent still holds {text}: restart it")
    what = "no collector, no program, no map" if process else "no collector"
    return Check(name, Status.OK, what)
