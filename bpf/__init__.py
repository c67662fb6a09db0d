"""The ground floor: eBPF objects, their maps and rings, and what the running kernel allows.

It knows nothing of collectors, events or the agent. Everything here is synchronous; callers that
live on an event loop call it in a thread.
"""

from bpf.features import Feature, Features, probe
from bpf.libbpf import AttachError, BpfError, LibbpfMissingError, LoadError
from bpf.maps import HashMap
from bpf.object import BpfObject, ProgramStats
from bpf.ring import RingReader

__all__ = [
    "AttachError",
    "BpfError",
    "BpfObject",
    "Feature",
    "Features",
    "HashMap",
    "LibbpfMissingError",
    "LoadError",
    "ProgramStats",
    "RingReader",
    "probe",
]
