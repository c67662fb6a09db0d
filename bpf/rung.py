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

from coral.bpf.loading.object import BpfObject
from coral.bpf.probing.features import Feature, Features

# The hooks of programs for raw tracepoints, best first.
HOOKS: Final = ("tp_btf", "raw_tp")
SESSIONS: Final = 64  # as in sessions.bpf.h
_FEW_SESSIONS: Final = 2
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
        """How many sessions can share one object. Only where functions take no more than numbers,
        the verifier goes through them once: not for perf buffers, and not with bcc."""
        if not self.session_maps.available:
            return 1
        once = self.loader.taken == "core" and self.buffer.taken == "ring_buffer"
        return SESSIONS if once else _FEW_SESSIONS

    @property
    def record_map(self) -> str:
        """The map of maps for the sessions' records; see records.bpf.h."""
        return "rings" if self.buffer.taken == "ring_buffer" else "perfs"

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
        options: Mapping[str, object] | None = None,
        map_entries: Mapping[str, int] | None = None,
        preallocated: Collection[str] = (),
        walks: Sequence[str] = (),
        without_maps: Collection[str] = (),
        shared: Mapping[str, int] | None = None,
        many_places: bool = False,
    ) -> BpfObject:
        """The object NAME with PROGRAMS, as the rung has it.

        `preallocated` are the hash maps whose elements are allocated when they are made on kernels
        that cannot allocate them on demand; `walks` are programs that user space runs;
        `without_maps` are not created, nor are those that the rung does not use; `shared` are maps
        of another object; `many_places` as in `BpfObject`. The object has to include sessions.bpf.h
        and records.bpf.h, and thread.bpf.h if the rung has a thread state.
        """
        stored, ringed = self.state.taken == "task_storage", self.buffer.taken == "ring_buffer"
        without = [*without_maps, *(("perfs", "record_drafts") if ringed else ("rings",))]
        wanted, hashes, settings = list(programs), list(preallocated), dict(options or {})
        if self.state.taken != _UNUSED:
            settings["state_in_task_storage"] = stored
            without += ["thread_hash"] if stored else ["thread_storage"]
            if not stored:  # a program frees the state with its thread
                wanted[:0] = ["coral_forget"]
                hashes.append("thread_hash")
        return BpfObject(
            name,
            programs=wanted,
            walks=walks,
            options={
                **settings,
                "current_by_btf": stored,  # which comes with Linux 5.11
                "records_in_ring": ringed,
                "slots": self.slots,
            },
            map_entries=map_entries or {},
            map_flags={} if self.on_demand.available else dict.fromkeys(hashes, 0),
            without_maps=without,
            shared=shared or {},
            many_places=many_places,
            typed=self.hook.taken == "tp_btf",
            loader=self.loader.taken,
            batches=self.reads.taken == "batch",
        )


def bytes_per_cpu(buffer_bytes: int) -> int:
    """The size of each CPU's perf buffer where all have about BUFFER_BYTES: a power of two of
    pages."""
    cpus = os.cpu_count() or 1
    return max(mmap.PAGESIZE, 1 << (buffer_bytes // cpus).bit_length() - 1)


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
