"""Which pods and containers a target means: the texts that users write, parsed.

    pod:shop/checkout-5d9c7b6f9c-x2x4p[/app]    one pod, or one container of it
    pods:shop?app=web,tier!=batch               the pods with these labels, also those to come
    namespace:shop                              all pods of a namespace, also those to come
    workload:shop/deploy/checkout               the pods of a workload, also those to come
    container:3f2a9c1d                          a container by its id, or by the beginning of it

The part before the colon is the option's name. Nothing here looks at a machine or a cluster.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from coral.collectors.options import Parser

# RFC 1123 labels and subdomains, as Kubernetes checks the names of objects.
_LABEL: Final = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN_BYTES: Final = 253
_CONTAINER_ID: Final = re.compile(r"(?:[a-z0-9.-]{1,32}://)?([0-9a-f]{4,64})")
# A label's key, with its optional prefix, and its value.
_NAME: Final = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_KEY: Final = rf"(?:[a-z0-9](?:[-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_NAME}"
_VALUE: Final = re.compile(rf"(?:{_NAME})?")
_EQUAL: Final = re.compile(rf"({_KEY})\s*(==|=|!=)\s*(\S*)")
_SET: Final = re.compile(rf"({_KEY})\s+(in|notin)\s*\(([^()]*)\)")
_EXISTS: Final = re.compile(rf"(!?)\s*({_KEY})")
_COMMAS: Final = re.compile(r",(?![^(]*\))")  # those outside of parentheses
_MOST_REQUIREMENTS: Final = 64

# The kinds of workloads, and what else they are called, as kubectl has it.
WORKLOADS: Final[Mapping[str, tuple[str, ...]]] = {
    "deployment": ("deploy", "deployments"),
    "statefulset": ("sts", "statefulsets"),
    "daemonset": ("ds", "daemonsets"),
    "replicaset": ("rs", "replicasets"),
    "job": ("jobs",),
    "cronjob": ("cj", "cronjobs"),
}
_WORKLOAD_OF: Final = {name: kind for kind, others in WORKLOADS.items() for name in (kind, *others)}


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a label selector asks of one label: that its value is one of VALUES, where there are
    any, or that it is there; or with WITHOUT the opposite."""

    key: str
    values: frozenset[str] = frozenset()
    without: bool = False

    def accepts(self, labels: Mapping[str, str]) -> bool:
        """Whether it holds for LABELS. A label that is not there has no value that is asked for."""
        there = labels.get(self.key) in self.values if self.values else self.key in labels
        return there is not self.without


@dataclass(frozen=True, slots=True)
class Selector:
    """One target: KIND is the option's name, TEXT its value. The other fields are the parts that
    the kind has; a container is a name with `pod`, the beginning of an id with `container`."""

    kind: str
    text: str
    namespace: str = ""
    pod: str = ""
    container: str = ""
    workload: tuple[str, str] | None = None  # kind and name
    labels: tuple[Requirement, ...] = ()

    @property
    def follows(self) -> bool:
        """Whether pods that come later belong to it."""
        return self.kind in ("pods", "namespace", "workload")

    def accepts(
        self,
        namespace: str,
        name: str,
        labels: Mapping[str, str],
        workloads: tuple[tuple[str, str], ...],
    ) -> bool:
        """Whether the pod NAME belongs to it, which is part of WORKLOADS, each a kind and a name.
        False for a selector of a container by its id."""
        if self.kind == "container" or namespace != self.namespace:
            return False
        if self.pod:
            return name == self.pod
        if self.workload:
            return self.workload in workloads
        return all(requirement.accepts(labels) for requirement in self.labels)

    def __str__(self) -> str:
        return f"{self.kind}:{self.text}"


def parse_pod(text: str) -> Selector:
    """`NAMESPACE/POD` or `NAMESPACE/POD/CONTAINER`. Raises ValueError, as all of these do."""
    namespace, pod, container, *more = (*text.split("/"), "", "")[: text.count("/") + 3]
    parts_are_valid = (
        _is_label(namespace)
        and _is_subdomain(pod)
        and (text.count("/") == 1 or _is_label(container))
    )
    if text.count("/") not in (1, 2) or any(more) or not parts_are_valid:
        raise ValueError
    return Selector("pod", text, namespace=namespace, pod=pod, container=container)


def parse_pods(text: str) -> Selector:
    """`NAMESPACE?LABELS`, a label selector of Kubernetes."""
    namespace, mark, labels = text.partition("?")
    if not mark or not _is_label(namespace) or not labels.strip():
        raise ValueError
    return Selector("pods", text, namespace=namespace, labels=parse_labels(labels))


def parse_namespace(text: str) -> Selector:
    """`NAMESPACE`."""
    if not _is_label(text):
        raise ValueError
    return Selector("namespace", text, namespace=text)


def parse_workload(text: str) -> Selector:
    """`NAMESPACE/KIND/NAME`."""
    parts = text.split("/")
    if len(parts) != 3:  # noqa: PLR2004  as the docstring says
        raise ValueError
    namespace, kind, name = parts
    canonical = _WORKLOAD_OF.get(kind.lower())
    if not canonical:
        raise ValueError(
            "NAMESPACE/KIND/NAME with one of these kinds: "
            + ", ".join(f"{kind} ({others[0]})" for kind, others in WORKLOADS.items())
        )
    if not _is_label(namespace) or not _is_subdomain(name):
        raise ValueError
    return Selector("workload", text, namespace=namespace, workload=(canonical, name))


def parse_container(text: str) -> Selector:
    """A container's id or the first four or more digits of it, also as `kubectl` shows it:
    `containerd://ID`."""
    match = _CONTAINER_ID.fullmatch(text)
    if not match:
        raise ValueError
    return Selector("container", text, container=match[1])


def parse_labels(text: str) -> tuple[Requirement, ...]:
    """A label selector of Kubernetes: `app=web,tier!=batch,zone in (a,b),!canary`. All of it must
    hold. Raises ValueError."""
    parts = [part.strip() for part in _COMMAS.split(text)]
    if len(parts) > _MOST_REQUIREMENTS:
        raise ValueError(f"a label selector of at most {_MOST_REQUIREMENTS} requirements")
    return tuple(map(_requirement, parts))


def _requirement(text: str) -> Requirement:
    if match := _EQUAL.fullmatch(text):
        key, values, without = match[1], [match[3]], match[2] == "!="
    elif match := _SET.fullmatch(text):
        key, without = match[1], match[2] == "notin"
        values = [value.strip() for value in match[3].split(",")]
    elif match := _EXISTS.fullmatch(text):
        return Requirement(match[2], without=bool(match[1]))
    else:
        values, key, without = ["?"], "", False
    if not all(map(_VALUE.fullmatch, values)):
        raise ValueError(
            "NAMESPACE?LABELS, where LABELS is a label selector such as app=web,tier!=batch,zone "
            f"in (a,b),!canary; {text!r} is none"
        )
    return Requirement(key, frozenset(values), without)


def _is_label(text: str) -> bool:
    return bool(_LABEL.fullmatch(text))


def _is_subdomain(text: str) -> bool:
    return len(text) <= _SUBDOMAIN_BYTES and all(map(_LABEL.fullmatch, text.split(".")))


@dataclass(frozen=True, slots=True)
class _Kind:
    accepts: str
    parse: Callable[[str], Selector]


_KINDS: Final[Mapping[str, _Kind]] = {
    "pod": _Kind("NAMESPACE/POD, or NAMESPACE/POD/CONTAINER", parse_pod),
    "pods": _Kind("NAMESPACE?LABELS, a label selector, such as shop?app=web", parse_pods),
    "namespace": _Kind("the name of a namespace of Kubernetes", parse_namespace),
    "workload": _Kind("NAMESPACE/KIND/NAME, such as shop/deploy/checkout", parse_workload),
    "container": _Kind(
        "the id of a container, or at least its first 4 digits, in hexadecimal", parse_container
    ),
}
SELECTORS: Final = tuple(_KINDS)
"""The names of the options that select pods or containers."""


def parse(kind: str, text: str) -> Selector:
    """TEXT as a selector of KIND, one of `SELECTORS`. Raises ValueError with a phrase to put after
    "give"."""
    known = _KINDS[kind]
    try:
        return known.parse(text)
    except ValueError as error:
        raise ValueError(str(error) or known.accepts) from None


def selector(kind: str) -> Parser:
    """The parser of the option KIND, whose value is the text itself, empty by default."""

    def checked(text: str) -> str:
        if text:
            parse(kind, text)
        return text

    return Parser(_KINDS[kind].accepts, checked)
