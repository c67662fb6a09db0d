"""The ground floor: eBPF objects, their maps and rings, and what the running kernel allows.

It knows nothing of collectors, events or the agent. Everything here is synchronous; callers that
live on an event loop call it in a thread.
"""

from bpf.features import Feature, Features, kernel_names, probe
from bpf.libbpf import AttachError, BpfError, LibbpfMissingError, LoadError
from bpf.maps import HashMap
from bpf.object import VERIFIER_LIMIT, BpfObject, ProgramStats, RecordReader
from bpf.perf_buffer import PerfReader
from bpf.ring import RingReader
from bpf.rung import Rung, Step, climb
from bpf.walk import Walk

__all__ = [
    "VERIFIER_LIMIT",
    "AttachError",
    "BpfError",
    "BpfObject",
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
