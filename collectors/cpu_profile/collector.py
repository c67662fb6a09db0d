"""Where the CPU time of processes goes: samples of their stacks, named. Source:
cpu_profile.bpf.c.

The programs send a record for each sample, with a copy of the user stack. User space unwinds and
names all samples of an interval at once, by array, in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Final

import numpy as np

from coral.bpf import Features, Rung, Step
from coral.bpf.attaching.sampling import CycleCounter, SpreadClock
from coral.bpf.closing import close_all
from coral.bpf.probing import capabilities
from coral.collectors.contract import Batch, ServiceProcesses, Summaries, Support
from coral.collectors.cpu_profile import sightings
from coral.collectors.cpu_profile.frames import memory_of, resolve
from coral.collectors.cpu_profile.intake import Intake
from coral.collectors.cpu_profile.measures import ProfileMeasures
from coral.collectors.cpu_profile.options import CLOCK, CYCLES, CpuProfileOptions
from coral.collectors.cpu_profile.process_names import process_names
from coral.collectors.cpu_profile.shared import Shared
from coral.collectors.cpu_profile.summaries import Profile, summaries
from coral.collectors.cpu_profile.user_stacks import unwound
from coral.collectors.hubs import Plan
from coral.collectors.kernel_collector import KernelCollector
from coral.mesh.v1 import ebpf_pb2 as pb

_OBJECT: Final = "cpu_profile"
_PROGRAM: Final = "coral_sample"
_CLOCK: Final = "cpu_clock"
_CYCLES: Final = "cpu_cycles"
_NS_PER_S: Final = 1_000_000_000
# Where samples are lost; other losses are of processes that are not watched for want of room.
_STAGES: Final = (int(pb.Loss.STAGE_KERNEL_BUFFER), int(pb.Loss.STAGE_KERNEL_BUSY))


class CpuProfileCollector(KernelCollector[CpuProfileOptions]):
    """Samples the watched processes."""

    kind = pb.EBPF_COLLECTOR_KIND_CPU_PROFILE
    options_type = CpuProfileOptions
    always_has_records = True
    continuous_defaults: ClassVar[Mapping[str, str]] = {"frequency": "19"}

    def __init__(
        self, options: CpuProfileOptions, service: ServiceProcesses | None, features: Features
    ) -> None:
        super().__init__(options, service, features)
        self._clock: SpreadClock | CycleCounter | None = None
        self._intake: Intake | None = None
        self._shared: Shared | None = None

    def _plan(self, features: Features) -> Plan:
        return Plan(
            _OBJECT,
            features,
            self._rung,
            programs=(),
            walks=(_PROGRAM, sightings.PROGRAM),
            options={},
            sizes=self._sizes,
        )

    @classmethod
    def support(cls, features: Features) -> Support:
        support = super().support(features)
        if features.obstacle or not support.supported:
            return support
        clock = features[_CLOCK]
        step = Step("timer", _CLOCK if clock.available else "", () if clock.available else (clock,))
        if reason := _obstacle(cls.climb(features), step):
            return replace(support, supported=False, reason=reason)
        steps = [*support.steps, step]
        if features[_CYCLES].available:
            steps.append(Step("counter", _CYCLES))
        return replace(support, steps=tuple(steps))

    @classmethod
    def refused_options(cls, features: Features, rung: Rung) -> Mapping[str, str]:
        refused = super().refused_options(features, rung)
        cycles = features[_CYCLES]
        return refused if cycles.available else {**refused, "event": f"`{CLOCK}`: {cycles.reason}"}

    @classmethod
    def wants(cls) -> Mapping[str, str]:
        return capabilities.NAMES_OF_CODE

    @classmethod
    def measures(cls, max_series: int) -> ProfileMeasures:
        return ProfileMeasures(max_series)

    def _open_maps(self) -> None:
        slot = self._slot
        session = np.zeros((), slot.object.map("profile_sessions").value_dtype)
        session["stack_bytes"] = self._options.stack_bytes
        slot.own("profile_sessions", session)
        self._records = ring = slot.long_reader("cpu_sample", self._options.ring)
        self._intake = Intake(ring)
        self._shared = slot.common(Shared)

    def _on_filled(self) -> None:
        if self._shared:
            self._shared.join(self._slot)
        program = self._slot.object.program_fd(_PROGRAM)
        kind = CycleCounter if self._options.event == CYCLES else SpreadClock
        self._clock = kind(program, self._options.frequency, self._slot.number)

    @property
    def notes(self) -> Sequence[str]:
        why_not = self._shared.why_not if self._shared else ""
        return (*super().notes, *([why_not] if why_not else []))

    def _read_summaries(self) -> Summaries:
        if self._intake is None or self._clock is None or self._shared is None:
            raise RuntimeError("not open")
        if self._slot.attached:
            self._clock.follow()
        else:
            self._clock.close()
        samples = self._intake.take()
        members = self._targets.read_with(samples.structs["tgid"], samples.structs["born"])
        with self._intake.emptying():
            with self._shared.code() as code:
                code.look(now=True)  # so that no program was sampled that is not known yet
                memory = memory_of(samples, code.processes)
                code.read_told(memory.processes)
                code.look(now=True)  # what a process has executed before its memory was read
            self._shared.prepare()
            with self._shared.code() as code:
                user = unwound(samples, memory, code.unwinder)
                code.look()
                frames = resolve(samples, user, memory, code)
                names = code.strings
        names_now = members.comms_of(samples.structs["tgid"], samples.structs["born"])
        processes = process_names(samples.structs, names_now)
        structs, table = samples.structs, self._targets.resource_table()
        groups = None
        if table:
            groups = self._targets.groups_of(members, structs["tgid"], structs["born"])
        if len(members.ended):
            self._targets.forget(members.ended)
        profile = Profile(samples, user, frames, names, processes, groups, table)
        service = self._targets.label
        if isinstance(self._clock, CycleCounter):
            return summaries(profile, service, 0, self._clock.period_cycles)
        return summaries(profile, service, _NS_PER_S // self._options.frequency)

    def drain(self) -> Batch:
        batch = super().drain()
        rows = batch.rows
        if isinstance(rows, Summaries):
            lost = np.array([sum(batch.losses.get(stage, 0) for stage in _STAGES)])
            rows = replace(rows, columns={**rows.columns, "samples_lost": lost})
        return replace(batch, rows=rows)

    def _events_in(self, rows: Summaries) -> int:
        return int(rows.columns["count"].sum())

    def close(self) -> None:
        clock, self._clock = self._clock, None
        shared, self._shared = self._shared, None
        steps: list[Callable[[], object]] = [super().close]
        if shared:
            steps.insert(0, partial(shared.leave, self._slot))
        if clock:
            steps.insert(0, clock.close)
        close_all(steps)


COLLECTOR: Final = CpuProfileCollector


def _obstacle(rung: Rung, step: Step) -> str:
    """Why the programs cannot run by RUNG with the timer of STEP; empty if they can."""
    if rung.loader.taken != "core":
        return "the programs need the kernel's BTF, and bcc does without it"
    if rung.buffer.taken != "ring_buffer":
        why = rung.buffer.why_not or "this machine has none"
        return f"no ring buffer, which samples are sent through ({why})"
    return "" if step.taken else f"no {step.what} ({step.why_not})"
