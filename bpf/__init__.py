"""The ground floor: eBPF objects, their maps and rings, and what the running kernel allows.

It knows nothing about collectors, events or the agent. Everything here is synchronous; callers on
an event loop call it in a thread.
"""

from coral.bpf.buffers.element_reader import ElementReader
from coral.bpf.buffers.maps import HashMap
from coral.bpf.buffers.perf_buffer import PerfReader
from coral.bpf.buffers.program_stats import ProgramStats
from coral.bpf.buffers.ring import RingReader
from coral.bpf.buffers.walk import Walk
from coral.bpf.libbpf import AttachError, BpfError, LibbpfMissingError, LoadError
from coral.bpf.loading.object import VERIFIER_LIMIT, BpfObject, RecordReader
from coral.bpf.probing.features import Feature, Features, kernel_names, probe
from coral.bpf.rung import Rung, Step, climb

__all__ = [
    "VERIFIER_LIMIT",
    "AttachError",
    "BpfError",
    "BpfObject",
    "ElementReader",
    "Feature",
    "Features",
    "HashMap",
    "LibbpfMissingError",
    "LoadError",
    "PerfReader",
    "ProgramStats",
    "RecordReader",
    "RingReader",
    "Rung",
    "Step",
    "Walk",
    "climb",
    "kernel_names",
    "probe",
]
