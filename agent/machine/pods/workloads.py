"""Which workload a pod is part of: by the owner that the API tells, or else by its labels and name.

The API names the direct owner alone. Its own owner follows from the names that controllers give: a
Deployment's ReplicaSet has the name of the Deployment and the pods' template hash, a CronJob's Job
that of the CronJob and a number. Without the API, controllers' labels say what kind it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

Workload = tuple[str, str]
"""A kind, as `coral.collectors.selectors.WORKLOADS` has it, and a name."""

_HASH: Final = "pod-template-hash"
_JOBS: Final = ("batch.kubernetes.io/job-name", "job-name")
_REVISION: Final = "controller-revision-hash"
_STATEFUL: Final = "statefulset.kubernetes.io/pod-name"
_SCHEDULED: Final = re.compile(r"(.+)-[0-9]{8,11}")  # minutes or seconds since 1970
_ORDINAL: Final = re.compile(r"(.+)-[0-9]+")
_RANDOM: Final = re.compile(r"(.+)-[a-z0-9]{5}")
_OWNERS: Final = {
    "ReplicaSet": "replicaset",
    "StatefulSet": "statefulset",
    "DaemonSet": "daemonset",
    "Job": "job",
    "Deployment": "deployment",
    "CronJob": "cronjob",
}


def by_owner(kind: str, name: str, labels: Mapping[str, str]) -> tuple[Workload, ...]:
    """The workloads of a pod with LABELS whose owner in the API is NAME, of KIND: that one, and the
    one that owns it."""
    known = _OWNERS.get(kind)
    return _with_owner(known, name, labels) if known else ()


def by_labels(name: str, labels: Mapping[str, str]) -> tuple[Workload, ...]:
    """The workloads of the pod NAME, as its labels and its name tell."""
    if hashed := labels.get(_HASH):
        match = _RANDOM.fullmatch(name)
        if match and match[1].endswith(f"-{hashed}"):
            return _with_owner("replicaset", match[1], labels)
    if job := next((labels[key] for key in _JOBS if labels.get(key)), ""):
        return _with_owner("job", job, labels)
    if labels.get(_STATEFUL) == name:
        return (("statefulset", match[1]),) if (match := _ORDINAL.fullmatch(name)) else ()
    if labels.get(_REVISION) and (match := _RANDOM.fullmatch(name)):
        return (("daemonset", match[1]),)
    return ()


def _with_owner(kind: str, name: str, labels: Mapping[str, str]) -> tuple[Workload, ...]:
    own: Workload = (kind, name)
    hashed = f"-{labels[_HASH]}" if labels.get(_HASH) else ""
    if kind == "replicaset" and hashed and name.endswith(hashed) and name != hashed:
        return own, ("deployment", name.removesuffix(hashed))
    if kind == "job" and (match := _SCHEDULED.fullmatch(name)):
        return own, ("cronjob", match[1])
    return (own,)
