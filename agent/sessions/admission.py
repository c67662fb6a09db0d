"""Whether a collector may start: its kind, the agent's policy, the machine, and a free slot."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from coral.agent.access import policy
from coral.agent.access.access import Access, Verdict
from coral.agent.access.rpcs import START
from coral.agent.access.target import Ownership, Target
from coral.agent.caller import Caller
from coral.agent.config import Config
from coral.agent.errors import (
    DeniedError,
    InvalidRequestError,
    LimitError,
    NotFoundError,
    UnsupportedError,
)
from coral.agent.jobs import Jobs
from coral.agent.machine.caller_namespaces import HERE, translated
from coral.agent.machine.pods.node import Pods
from coral.agent.machine.pods.target import PodTarget
from coral.agent.machine.privileges import refusal
from coral.agent.machine.resolve import resolve
from coral.agent.sessions.session import StartRequest, lease_s
from coral.bpf import BpfError, Features, probe
from coral.bpf.probing import capabilities
from coral.collectors import namespaces, selectors
from coral.collectors.contract import Collector, Coverage, ServiceProcesses, Support, Watched
from coral.collectors.options import OptionError, UnknownOptionError
from coral.collectors.registry import COLLECTORS
from coral.collectors.runner import in_thread
from coral.collectors.target_options import TARGETS
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_name, kind_of

# Both are in every description of the session, the name in the log and in metrics too.
_SERVICE_NAME_BYTES: Final = 128
_CONFIG_BYTES: Final = 64 << 10
_TARGET_KEYS: Final = frozenset(TARGETS)


@dataclass(frozen=True)
class Admitted:
    """A collector that may be opened, what it is about to watch, and by what it was allowed: None
    for one of the configuration."""

    collector: Collector
    target: Target
    ownership: Ownership
    verdict: Verdict | None
    pods: PodTarget | None = None


class Admission:
    """Turns a request into a collector that may be opened, or refuses it."""

    def __init__(self, config: Config, access: Access) -> None:
        self._config = config
        self._access = access
        self.pods = Pods(config.kubernetes)
        self._on_demand = 0  # slots that are taken
        self._jobs = Jobs()

    async def features(self) -> Features:
        """What this kernel can do, with the loader that the configuration wants; found at the first
        call, in a thread."""
        found, wanted = await in_thread(probe), self._config.loader
        if not found.obstacle:
            found = replace(found, obstacle=namespaces.obstacle())
        return found if wanted == "auto" else replace(found, loader=wanted)

    async def capabilities(self) -> Mapping[str, Support]:
        """Of each kind of collector, whether it can run here, by which hook, or why not."""
        features = await self.features()
        return {
            kind_name(kind): self._support(collector, features)
            for kind, collector in COLLECTORS.items()
        }

    def _support(self, collector: type[Collector], features: Features) -> Support:
        has = features.capabilities
        if features.obstacle and features.obstacle != capabilities.obstacle(has):
            return Support(False, reason=features.obstacle)
        reason = refusal(
            collector.needs(),
            has,
            capabilities.of_kernel(),
            observe_only=self._config.policy.observe_only,
        )
        return Support(False, reason=reason) if reason else collector.support(features)

    def admit(self, request: StartRequest) -> type[Collector]:
        """Everything that can be refused without looking at the machine. Raises a
        `RefusedError`."""
        kind = _kind(request.kind)
        allowed = self._config.policy.collectors
        if allowed and kind_name(kind) not in allowed:
            raise DeniedError(
                f"kind: {kind_name(kind)} is not allowed by this agent's policy.collectors, "
                f"{', '.join(allowed)}"
            )
        lease_s(request.duration_s, self._config)
        _check_size("service_name", [request.service_name], _SERVICE_NAME_BYTES)
        _check_size("config", request.config.values(), _CONFIG_BYTES)
        if kind not in COLLECTORS:
            raise UnsupportedError(
                f"this agent has no {kind_name(kind)} collector; it has "
                + ", ".join(map(kind_name, COLLECTORS))
            )
        return COLLECTORS[kind]

    @contextmanager
    def slot(self, request: StartRequest) -> Iterator[None]:
        """A place among the collectors on demand, from the first step of a start to the end of the
        session. Continuous collectors need none. Raises `LimitError`."""
        if request.continuous:
            yield
            return
        most, taken = self._config.limits.concurrent_collectors, self._on_demand
        if taken >= most:
            raise LimitError(
                f"limits.concurrent_collectors is {most}, and {taken} are at work: stop one "
                "(`coral collectors` lists them, `coral stop ID` ends one), or wait for its lease "
                f"to end, before you start this {kind_name(_kind(request.kind))}",
                "limits.concurrent_collectors",
            )
        self._on_demand += 1
        try:
            yield
        finally:
            self._on_demand -= 1

    async def translate(self, request: StartRequest, caller: Caller) -> StartRequest:
        """REQUEST with the target as this agent names it. Raises as `create` does."""
        if request.named_in == HERE:
            return request
        if (await self.features()).obstacle:
            return request  # `create` says why it cannot be started, whatever its target
        with _refusing():
            # In a thread: it looks at every process or cgroup.
            config = await self._jobs.run(
                lambda: translated(request.config, request.named_in, caller.pid), "config"
            )
        return replace(request, config=config, named_in=HERE)

    async def create(
        self, collector: type[Collector], request: StartRequest, caller: Caller
    ) -> Admitted:
        """The collector that REQUEST of CALLER asks for, if this machine can run it; nothing of it
        is in the kernel yet. Raises a `RefusedError`, or a `BpfError` where /proc cannot be
        read."""
        with _refusing():
            features = await self.features()
            support = self._support(collector, features)
            if not support.supported:
                raise UnsupportedError(f"{kind_name(collector.kind)}: {support.reason}")
            # In a thread: it looks at each process that is named.
            return await self._jobs.run(
                lambda: self._create(collector, request, features, caller),
                kind_name(collector.kind),
            )

    def _create(
        self,
        collector: type[Collector],
        request: StartRequest,
        features: Features,
        caller: Caller,
    ) -> Admitted:
        """Blocks."""
        allowed = self._config.policy
        pods, service = self._pods(collector.kind, request, features, caller), None
        if pods:
            name = request.service_name or pods.label
            service = ServiceProcesses(name, (), pods, pods.namespaces)
        else:
            service = self._resolve(collector.kind, request, caller)
        if service and not pods and not request.continuous:
            service = policy.spare(service, allowed)
        created = collector.create(request.config, service, features)
        # Where its options name the target, the service is a label.
        named = None if _TARGET_KEYS & request.config.keys() else service
        is_single = created.coverage is Coverage.NONE
        target = Target(
            collector.kind,
            created.watched,
            named,
            is_single,
            service.namespaces if service else (),
            pods.pods if pods else (),
        )
        verdict = None if request.continuous else self._decide(caller, target)
        if pods and verdict:
            scopes = (policy.Scope.of_policy(allowed), verdict.scope)
            pods.within = policy.within(scopes, named, target.namespaces)
        created.spare(policy.spared(allowed))
        covered_by = self._access.covering(target)
        if verdict and verdict.rule is not None:  # whose scope holds for what comes later, too
            covered_by |= {verdict.rule}
        ownership = Ownership(
            "" if request.continuous else caller.identity.principal,
            request.continuous,
            target.namespaces,
            covered_by,
        )
        return Admitted(created, target, ownership, verdict, pods)

    def _decide(self, caller: Caller, target: Target) -> Verdict:
        verdict = self._access.decide(caller.identity, START, target)
        if not verdict.allowed:
            raise _denied(verdict, target)
        return verdict

    def _pods(
        self, kind: int, request: StartRequest, features: Features, caller: Caller
    ) -> PodTarget | None:
        """The pods that REQUEST names, by its options or by the rule of its service."""
        config: Mapping[str, str] = request.config
        rule, service = self._config.services.get(request.service_name), None
        if rule and not _TARGET_KEYS & config.keys():
            config, service = rule.selectors, ServiceProcesses(request.service_name, ())
        name = next((each for each in selectors.SELECTORS if config.get(each)), "")
        try:
            selector = selectors.parse(name, config[name]) if name else None
        except ValueError:
            return None  # it is refused with all other options
        if not selector:
            return None
        if request.continuous:
            return self.pods.target(selector, features)
        named = (selector.namespace,) if selector.namespace else ()
        asked = Target(kind, Watched(pods=str(selector)), service, namespaces=named)
        sees = partial(self._access.sees_namespace, caller.identity)
        if named:
            self._check_known(caller, asked, named)
            return self.pods.target(selector, features, sees)
        try:
            found = self.pods.target(selector, features, sees)
        except NotFoundError:
            self._check_known(caller, asked, ())
            raise
        self._check_known(caller, asked, found.namespaces)
        return found

    def _check_known(self, caller: Caller, asked: Target, namespaces: tuple[str, ...]) -> None:
        """Refuses what is in NAMESPACES that the caller may not know of as if it did not exist: by
        what was ASKED for alone, which does not have a container's namespace. Raises
        `DeniedError`."""
        identity, access = caller.identity, self._access
        if all(access.sees_namespace(identity, each) for each in namespaces or ("",)):
            return
        if access.looks_at_cgroups(identity):
            return
        if access.foresee(identity, START, replace(asked, namespaces=namespaces)).allowed:
            return
        verdict = access.foresee(identity, START, asked)
        if not verdict.allowed:
            raise _denied(verdict, asked)

    def _resolve(self, kind: int, request: StartRequest, caller: Caller) -> ServiceProcesses | None:
        name = request.service_name
        if not name or _TARGET_KEYS & request.config.keys():
            return None
        # Whether it is well formed is checked with all other options.
        alone = request.config.get("follow_children", "").lower() == "false"
        services = self._config.services
        if request.continuous:
            return resolve(name, services, descendants=not alone)
        asked = Target(kind, Watched(), ServiceProcesses(name, ()))
        verdict = self._access.foresee(caller.identity, START, asked)
        if not verdict.allowed and not self._access.looks_at_cgroups(caller.identity):
            raise _denied(verdict, asked)
        try:
            return resolve(name, services, descendants=not alone)
        except NotFoundError as error:
            if verdict.allowed and not verdict.scope.lists:
                raise
            # What else is there is not for callers of some of it.
            raise NotFoundError(error.reason) from error


def _denied(verdict: Verdict, target: Target) -> DeniedError:
    error = DeniedError(verdict.reason)
    error.resolved = target.described()
    return error


@contextmanager
def _refusing() -> Iterator[None]:
    """Makes refusals of what looking at a request's options raises."""
    try:
        yield
    except (OptionError, UnknownOptionError) as error:
        raise InvalidRequestError(str(error)) from error
    except OSError as error:  # /proc cannot be read: there are no descriptors left
        raise BpfError(f"reading {error.filename}", error.errno or errno.EIO) from error


def _check_size(field: str, texts: Iterable[str], most_bytes: int) -> None:
    size_bytes = sum(len(text.encode(errors="replace")) for text in texts)
    if size_bytes > most_bytes:
        raise InvalidRequestError(
            f"{field}: {size_bytes} bytes are not accepted; give at most {most_bytes}"
        )


def _kind(kind: str | int) -> int:
    if isinstance(kind, str):
        try:
            return kind_of(kind)
        except ValueError:
            pass
    elif kind and kind in pb.EbpfCollectorKind.values():
        return kind
    choices = (item for item in pb.EbpfCollectorKind.items() if item[1])
    raise InvalidRequestError.not_one_of("kind", kind, choices)
