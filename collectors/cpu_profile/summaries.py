"""The profile of an interval as columns, made by array, and as messages for subscribers that want
rows."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coral.collectors.columns import Strings, group
from coral.collectors.contract import Summaries
from coral.collectors.cpu_profile.frames import Frames, UserStacks, mixed
from coral.collectors.cpu_profile.ragged import Ragged, fingerprints
from coral.collectors.cpu_profile.samples import IN_KERNEL, STACK_CUT, Samples
from coral.collectors.members import comm_text
from coral.collectors.resources import ResourceTable, with_resources
from coral.collectors.symbols.strings import Strings as Names
from coral.mesh.v1 import ebpf_pb2 as pb

_FACTOR: Final = secrets.randbits(64) | 1


class Profile(NamedTuple):
    """The samples of an interval, n of them: with their user stacks and their frames, the strings
    that frames point into, and the command names of their processes, of shape (n,). With a TABLE of
    resources, the groups of their processes, of shape (n,)."""

    samples: Samples
    user: UserStacks
    frames: Frames
    names: Names
    processes: NDArray[np.bytes_]
    groups: NDArray[np.uint32] | None = None
    resources: ResourceTable | None = None


def summaries(profile: Profile, service: str, period_ns: int, period_cycles: int = 0) -> Summaries:
    """A row for each stack, thread, end of the stack and mode of the samples, each of which stands
    for PERIOD_NS of CPU time, or for PERIOD_CYCLES. What was lost is for the caller to fill in."""
    samples, user, frames, names, processes, groups, resources = profile
    strings = Strings()
    structs = samples.structs
    table = _table(frames.table, names, strings)
    of_stack = fingerprints(frames.stacks, mixed(np.arange(len(frames.table))), _FACTOR)
    comm = np.ascontiguousarray(structs["comm"]).view("<u8").reshape(-1, 2)
    in_kernel = samples.has(IN_KERNEL)
    keys = mixed(
        of_stack, structs["tgid"], structs["tid"], structs["born"], structs["execs"],
        comm[:, 0], comm[:, 1], user.ends, user.unwinding, in_kernel,
    )  # fmt: skip
    first, of_row = group(keys)
    some, stack = group(of_stack[first])
    stacks = frames.stacks.take(first[some])
    columns: dict[str, NDArray[Any]] = {
        "stack": stack,
        "count": np.bincount(of_row, minlength=len(first)),
        "tgid": structs["tgid"][first],
        "tid": structs["tid"][first],
        "comm": strings.indices(structs["comm"][first], comm_text),
        "process": strings.indices(processes[first], comm_text),
        "service": np.full(len(first), strings.index(service) if len(first) else 0),
        "end": user.ends[first],
        "unwinding": user.unwinding[first],
        "in_kernel": in_kernel[first],
        "stack_length": stacks.lengths,
        "stack_frames": stacks.flat,
        **table,
        "period_ns": np.array([period_ns]),
        "period_cycles": np.array([period_cycles]),
        "samples": np.array([len(samples)]),
        "samples_lost": np.zeros(1, np.uint64),
        "samples_truncated": np.array([np.count_nonzero(samples.has(STACK_CUT))]),
    }
    made = Summaries(pb.CpuProfileColumns, columns, strings.table, messages, len(first), shrink)
    resource = resources.indices(groups[first]) if resources and groups is not None else None
    return with_resources(made, resource, resources)


def shrink(columns: dict[str, NDArray[Any]], has_first: bool) -> Mapping[str, NDArray[Any]]:
    """COLUMNS without the stacks and frames that no row has any more. Of the parts of an interval,
    the one that HAS the FIRST row says what was lost."""
    used, stack = np.unique(columns["stack"], return_inverse=True)
    stacks = Ragged(columns["stack_frames"], columns["stack_length"].astype(np.int64)).take(used)
    frames, flat = np.unique(stacks.flat, return_inverse=True)
    tables = {name: columns[name][frames] for name in columns if name.startswith("frame_")}
    told = ("samples_lost", "samples_truncated")
    return {
        **columns,
        **tables,
        "stack": stack,
        "stack_length": stacks.lengths,
        "stack_frames": flat,
        "samples": np.array([columns["count"].sum()]),
        **({} if has_first else {name: np.zeros(1, np.uint64) for name in told}),
    }


def _table(frames: NDArray[Any], names: Names, strings: Strings) -> dict[str, NDArray[Any]]:
    return {
        **{
            f"frame_{name}": strings.indices(frames[name], names.__getitem__)
            for name in ("function", "module", "build_id")
        },
        "frame_address": frames["address"],
        "frame_flags": frames["flags"],
    }


def end_text(end: int) -> str:
    """`bottom` and its like."""
    return pb.CpuStackEnd.Name(end).removeprefix("CPU_STACK_END_").lower()


def mode_text(in_kernel: int) -> str:
    """`kernel` or `user`."""
    return "kernel" if in_kernel else "user"


def _single(column: NDArray[Any]) -> int:
    return int(column[0]) if len(column) else 0


def messages(
    columns: Mapping[str, NDArray[Any]], strings: Sequence[str]
) -> list[pb.CpuProfileSample]:
    """The rows of COLUMNS, a pb.CpuProfileColumns as arrays, as messages."""
    functions = [strings[index] for index in columns["frame_function"].tolist()]
    stacks = Ragged(columns["stack_frames"], columns["stack_length"].astype(np.int64))
    starts, lengths = stacks.starts.tolist(), stacks.lengths.tolist()
    flat = stacks.flat.tolist()
    names = ("stack", "count", "tgid", "tid", "comm", "process", "end", "unwinding", "in_kernel")
    period_ns, period_cycles = (_single(columns[name]) for name in ("period_ns", "period_cycles"))
    rows = []
    for stack, count, tgid, tid, comm, process, end, unwinding, in_kernel in zip(
        *(columns[name].tolist() for name in names), strict=True
    ):
        begin = starts[stack]
        rows.append(
            pb.CpuProfileSample(
                stack=[functions[frame] for frame in flat[begin : begin + lengths[stack]]],
                count=count,
                labels={
                    "pid": str(tgid),
                    "tid": str(tid),
                    "comm": strings[comm],
                    "process": strings[process],
                    "mode": mode_text(in_kernel),
                    "end": end_text(end),
                },
                period_ns=period_ns,
                period_cycles=period_cycles,
                tgid=tgid,
                tid=tid,
                comm=strings[comm],
                process=strings[process],
                end=end,
                unwinding=unwinding,
                in_kernel=bool(in_kernel),
            )
        )
    return rows
