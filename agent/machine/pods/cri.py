"""The container runtime's own list of pods and containers, over its CRI socket.

Whoever may open that socket can do anything on the node; the agent only ever calls Version,
ListPodSandbox and ListContainers.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from coral.agent.machine.pods.cgroup_names import uid_key
from coral.agent.machine.pods.facts import Container, Facts, Pod
from coral.agent.machine.pods.source import SourceError
from coral.agent.machine.pods.workloads import by_labels
from coral.mesh.cri.v1 import cri_pb2 as cri

# Where runtimes listen by default: containerd, CRI-O, k3s, cri-dockerd.
SOCKETS: Final = (
    "/run/containerd/containerd.sock",
    "/run/crio/crio.sock",
    "/run/k3s/containerd/containerd.sock",
    "/run/cri-dockerd.sock",
)
_VERSIONS: Final = ("runtime.v1", "runtime.v1alpha2")
_TIMEOUT_S: Final = 2.0
_MOST_BYTES: Final = 16 << 20
_HOW: Final = "mount the runtime's socket, or name it in kubernetes.cri"

Answer = TypeVar("Answer", bound=Message)


class Cri:
    """The runtime at the unix socket PATH, or at the first of `SOCKETS` that is there."""

    name = "cri"

    def __init__(self, path: str = "") -> None:
        self._paths: Sequence[str] = (path,) if path else SOCKETS
        self._channel: grpc.Channel | None = None
        self._package = ""
        self.about = ""

    def fetch(self) -> Facts:
        """See `Source`."""
        self._connect()
        sandboxes = self._call(
            "ListPodSandbox", cri.ListPodSandboxRequest(), cri.ListPodSandboxResponse
        )
        containers = self._call(
            "ListContainers", cri.ListContainersRequest(), cri.ListContainersResponse
        )
        uid_of = {box.id: uid_key(box.metadata.uid) for box in sandboxes.items}
        # A pod that was started again has a sandbox for each start; the newest counts.
        newest = sorted(sandboxes.items, key=lambda box: box.created_at)
        pods = tuple({uid_of[box.id]: _pod(box) for box in newest}.values())
        found = [
            Container(each.id, uid_of.get(each.pod_sandbox_id, ""), each.metadata.name)
            for each in containers.containers
        ]
        # The container that holds a pod's namespaces is in no list of containers.
        found += [Container(box.id, uid_of[box.id], "") for box in sandboxes.items]
        return Facts(pods, tuple(found))

    def close(self) -> None:
        """See `Source`."""
        if self._channel:
            self._channel.close()
            self._channel = None

    def _connect(self) -> None:
        if self._channel:
            return
        path = _first_socket(self._paths)
        self._channel = grpc.insecure_channel(
            f"unix:{path}",
            options=(
                ("grpc.max_receive_message_length", _MOST_BYTES),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.enable_http_proxy", 0),
            ),
        )
        try:
            for self._package in _VERSIONS:
                try:
                    version = self._call("Version", cri.VersionRequest(), cri.VersionResponse)
                except _UnimplementedError:
                    continue
                about = f"{version.runtime_name} {version.runtime_version}".strip()
                self.about = f"{about or 'a runtime'} at {path}, {self._package}"
                return
        except SourceError:
            self.close()
            raise
        self.close()
        raise SourceError(f"{path} serves neither {' nor '.join(_VERSIONS)}: {_HOW}")

    def _call(self, method: str, request: Message, answer: type[Answer]) -> Answer:
        assert self._channel  # noqa: S101  `_connect` came before
        call: Any = self._channel.unary_unary(
            f"/{self._package}.RuntimeService/{method}",
            request_serializer=type(request).SerializeToString,
        )
        try:
            # Parsed here: gRPC would log what its deserialiser raises.
            found: Answer = answer.FromString(call(request, timeout=_TIMEOUT_S))
        except grpc.RpcError as error:
            code = error.code()
            if code is grpc.StatusCode.UNIMPLEMENTED:
                raise _UnimplementedError(f"the runtime has no {method}") from error
            self.close()
            details = error.details()
            raise SourceError(f"{method}: {code.name}: {details}") from error
        except DecodeError as error:
            raise SourceError(f"{method}: the answer is none of the CRI: {error}") from error
        return found


class _UnimplementedError(SourceError):
    pass


def _first_socket(paths: Sequence[str]) -> str:
    denied = ""
    for path in paths:
        try:
            if stat.S_ISSOCK(Path(path).stat().st_mode):
                return path
        except PermissionError as error:
            denied = f"{path}: {error.strerror}"
        except OSError:
            continue
    nowhere = f"there is no socket at {' or '.join(paths)}"
    raise SourceError(f"{denied or nowhere}: {_HOW}")


def _pod(box: cri.PodSandbox) -> Pod:
    told, labels = box.metadata, dict(box.labels)
    return Pod.of(
        told.uid,
        told.namespace,
        told.name,
        labels=labels,
        annotations=dict(box.annotations),
        workloads=by_labels(told.name, labels),
    )
