"""The ladder: for everything that kernels do in different ways, the best way that this kernel has.

A collector names its hooks and its needs; `climb` chooses the loader, hook, thread state, record
buffer and map reads, and gives the reason for every better one that was refused. `Rung.object`
makes the object accordingly, so that a collector does not know which loader it got.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from coral.bpf.loading.bcc_object import BccObject
from coral.bpf.loading.object import BpfObject, RecordReader
from coral.bpf.probing.features import Feature, Features

# The hooks of programs for raw tracepoints, best first.
HOOKS: Final = ("tp_btf", "raw_tp")
SESSIONS: Final = 64  # as in sessions.bpf.h
_LOADERS: Final = {"core": "btf", "bcc": "bcc"}  # and the feature that each needs
_NO_BTF: Final = "it needs BTF, which programs compiled by bcc lack"
_ALL: Final = "keys one by one"
_UNUSED: Final = "not used"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that kernels do in different ways: the way taken, empty if there is none, and the
    better ways that were refused, with the reasons."""

    what: str
    taken: str
    refused: tuple[Feature, ...] = ()

    @property
    def why_not(self) -> str:
        """The reasons for all refusals."""
        return "; ".join(f"{feature.name}: {feature.reason}" for feature in self.refused)


@dataclass(frozen=True, slots=True)
class Rung:
    """What a collector gets on this kernel."""

    loader: Step
    hook: Step
    state: Step
    buffer: Step
    reads: Step
    on_demand: Feature  # hash elements are allocated when they are needed
    session_maps: Feature  # sessions of different sizes share one object

    @property
    def slots(self) -> int:
        """How many sessions can share one object."""
        return SESSIONS if self.session_maps.available else 1

    def __iter__(self) -> Iterator[Step]:
        steps = (self.loader, self.hook, self.state, self.buffer, self.reads)
        return iter(step for step in steps if step.taken != _UNUSED)

    @property
    def missing(self) -> Sequence[Step]:
        """The indispensable steps for which this kernel has no way."""
        return [step for step in (self.loader, self.hook, self.state) if not step.taken]

    def object(
        self,
        name: str,
        *,
        programs: Sequence[str],
        options: Mapping[str, object],
        map_entries: Mapping[str, int],
        preallocated: Collection[str],
        records: int = 0,
        walks: Sequence[str] = (),
        without_maps: Collection[str] = (),
    ) -> BpfObject:
        """The object NAME with PROGRAMS, as the rung has it.

        `records` is the size of the record buffer in bytes, 0 if the collector sends none;
        `preallocated` are the hash maps whose elements are allocated at load time on kernels that
        cannot allocate them on demand; `walks` are programs that user space runs;
        `without_maps` are not created, nor are those that the rung does not use. The object has to
        include records.bpf.h, and thread.bpf.h if the rung has a thread state.
        """
        stored, ringed = self.state.taken == "task_storage", self.buffer.taken == "ring_buffer"
        without = [*without_maps] + ([] if records and ringed else ["ring"])
        without += [] if records and not ringed else ["perf"]
        wanted, hashes, settings = list(programs), list(preallocated), dict(options)
        if self.state.taken != _UNUSED:
            settings["state_in_task_storage"] = stored
            without += ["thread_hash"] if stored else ["thread_storage"]
            if not stored:  # the kernel does not free the state with its thread: a program does
                wanted.insert(0, "coral_forget")
                hashes.append("thread_hash")
        cls = BpfObject if self.loader.taken == "core" else BccObject
        return cls(
            name,
            programs=wanted,
            walks=walks,
            options={
                **settings,
                "current_by_btf": stored,  # both came with Linux 5.11
                "records_in_ring": ringed,
            },
            map_entries={**map_entries, **({"ring": records} if records and ringed else {})},
            map_flags={} if self.on_demand.available else dict.fromkeys(hashes, 0),
            without_maps=without,
            typed=self.hook.taken == "tp_btf",
            batches=self.reads.taken == "batch",
        )

    def reader(
        self,
        bpf_object: BpfObject,
        record: str,
        *,
        buffer_bytes: int,
        wakeup_bytes: int,
        order_by: str,
    ) -> RecordReader:
        """The reader of a loaded object's records, each a `struct RECORD`; records of different
        CPUs are sorted by the field ORDER_BY, a time."""
        if self.buffer.taken == "ring_buffer":
            return bpf_object.ring("ring", record)
        # The same total: a power of two of pages per CPU.
        cpus = os.cpu_count() or 1
        return bpf_object.perf(
            "perf",
            record,
            bytes_per_cpu=max(mmap.PAGESIZE, 1 << (buffer_bytes // cpus).bit_length() - 1),
            wakeup_bytes=wakeup_bytes // cpus,
            order_by=order_by,
        )


def climb(features: Features, hooks: Sequence[str], *, thread_state: bool = True) -> Rung:
    """The rung of a collector whose programs attach to one of HOOKS, named best first, and which
    keeps a state for each thread if THREAD_STATE."""
    loader = _loader(features)
    by_bcc = loader.taken == "bcc"
    return Rung(
        loader,
        _first(features, "hook", hooks, {"tp_btf": _NO_BTF} if by_bcc else {}),
        _first(
            features,
            "thread state",
            ("task_storage", "percpu_hash"),
            {"task_storage": _NO_BTF} if by_bcc else {},
            called={"percpu_hash": "hash"},
        )
        if thread_state
        else Step("thread state", _UNUSED),
        _first(features, "record buffer", ("ring_buffer", "perf_buffer"), {}),
        _first(features, "map reads", ("batch", _ALL), {}, free=_ALL),
        features["elements_on_demand"],
        features["session_maps"],
    )


def _loader(features: Features) -> Step:
    wanted = tuple(_LOADERS) if features.loader == "auto" else (features.loader,)
    refused: list[Feature] = []
    for loader in wanted:
        needed = features[_LOADERS[loader]]
        if needed.available:
            return Step("loader", loader, tuple(refused))
        refused.append(Feature(loader, False, needed.reason))
    others = [name for name in set(_LOADERS) - set(wanted) if features[_LOADERS[name]].available]
    if others:  # one was forced
        reason = f"{refused[0].reason}; `loader: auto` chooses {others[0]} here"
        refused = [replace(refused[0], reason=reason)]
    return Step("loader", "", tuple(refused))


def _first(
    features: Features,
    what: str,
    ways: Sequence[str],
    excluded: Mapping[str, str],
    *,
    called: Mapping[str, str] | None = None,
    free: str = "",
) -> Step:
    """The first of WAYS that the kernel has and that is not EXCLUDED; FREE needs no feature."""
    refused: list[Feature] = []
    for way in ways:
        name = (called or {}).get(way, way)
        feature = Feature(way, False, excluded[way]) if way in excluded else features[way]
        if way == free or feature.available:
            return Step(what, name, tuple(refused))
        refused.append(Feature(name, False, feature.reason))
    return Step(what, "", tuple(refused))
