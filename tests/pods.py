"""Pods without Kubernetes: cgroups as a kubelet and a runtime make them, and a runtime's CRI socket
that lists what the test says."""

from __future__ import annotations

import json
import ssl
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import grpc

from coral.agent.machine.pods.node import Pods
from coral.collectors.hierarchies import Kind, hierarchies
from coral.mesh.cri.v1 import cri_pb2 as cri
from tests.support import Puppet, wait_until

HASH = "5d9c7b6f9c"


def new_id() -> str:
    """An id as runtimes give containers."""
    return uuid.uuid4().hex + uuid.uuid4().hex


@dataclass
class FakePod:
    """A pod of a test: its cgroup is below TOP, whose name has kubelets' form."""

    top: Path
    namespace: str
    name: str
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    sandbox: str = field(default_factory=new_id)
    containers: dict[str, str] = field(default_factory=dict)  # ids by name

    @property
    def directory(self) -> Path:
        """Its cgroup."""
        return self.top / f"kubepods-burstable-pod{self.uid.replace('-', '_')}.slice"

    def directory_of(self, container: str) -> Path:
        """A container's cgroup."""
        return self.directory / f"cri-containerd-{self.containers[container]}.scope"

    def add(self, container: str) -> None:
        """Names a container; nothing of it exists yet."""
        self.containers[container] = new_id()

    def make(self, container: str = "") -> Path:
        """Makes the pod's cgroup, or that of a container; returns it."""
        self.directory.mkdir(exist_ok=True)
        directory = self.directory_of(container) if container else self.directory
        directory.mkdir(exist_ok=True)
        return directory


@contextmanager
def kubepods() -> Iterator[Path]:
    """A cgroup of this machine in which a test may make pods, where runtimes would: it is removed
    with all that is in it, once no process is."""
    found = {each.kind: each.directory for each in hierarchies()}
    with made_in(found.get("memory") or found["v2"]) as top:
        yield top


@contextmanager
def made_in(directory: Path) -> Iterator[Path]:
    """A cgroup below DIRECTORY, named as a kubelet names that of all pods, and removed likewise."""
    top = directory / f"kubepods-{uuid.uuid4().hex[:8]}.slice"
    top.mkdir()
    try:
        yield top
    finally:
        for below in (*sorted(top.rglob("*/"), reverse=True), top):
            wait_until(partial(_has_gone, below))


def _has_gone(directory: Path) -> bool:
    with suppress(OSError):
        directory.rmdir()
    return not directory.exists()


@dataclass
class Runtime:
    """What a container runtime knows, served over a CRI socket."""

    socket: Path
    pods: list[FakePod] = field(default_factory=list)
    calls: int = 0

    def sandboxes(self, _request: object, _context: object) -> cri.ListPodSandboxResponse:
        self.calls += 1
        return cri.ListPodSandboxResponse(
            items=[
                cri.PodSandbox(
                    id=pod.sandbox,
                    metadata=cri.PodSandboxMetadata(
                        name=pod.name, uid=pod.uid, namespace=pod.namespace
                    ),
                    labels=pod.labels,
                    annotations=pod.annotations,
                    created_at=number,
                )
                for number, pod in enumerate(self.pods)
            ]
        )

    def containers(self, _request: object, _context: object) -> cri.ListContainersResponse:
        return cri.ListContainersResponse(
            containers=[
                cri.Container(
                    id=each, pod_sandbox_id=pod.sandbox, metadata=cri.ContainerMetadata(name=name)
                )
                for pod in self.pods
                for name, each in pod.containers.items()
            ]
        )

    @staticmethod
    def version(_request: object, _context: object) -> cri.VersionResponse:
        return cri.VersionResponse(runtime_name="test-runtime", runtime_version="1.2.3")


@contextmanager
def runtime(directory: Path, package: str = "runtime.v1") -> Iterator[Runtime]:
    """A runtime that serves PACKAGE alone, on a unix socket in DIRECTORY."""
    served = Runtime(directory / "cri.sock")
    methods: dict[str, tuple[Any, Any]] = {
        "Version": (served.version, cri.VersionRequest),
        "ListPodSandbox": (served.sandboxes, cri.ListPodSandboxRequest),
        "ListContainers": (served.containers, cri.ListContainersRequest),
    }
    handlers: dict[str, Any] = {
        name: grpc.unary_unary_rpc_method_handler(
            behaviour,
            request_deserializer=request.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        for name, (behaviour, request) in methods.items()
    }
    server = grpc.server(ThreadPoolExecutor(2))
    service = f"{package}.RuntimeService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"unix:{served.socket}")
    server.start()
    try:
        yield served
    finally:
        server.stop(None).wait()


@dataclass
class Node:
    """A node with a runtime, and where it makes cgroups."""

    top: Path
    runtime: Runtime
    pods: Pods

    @property
    def kind(self) -> Kind:
        found = (each for each in hierarchies() if self.top.is_relative_to(each.directory))
        return max(found, key=lambda each: len(each.directory.parts)).kind

    def pod(self, namespace: str, name: str, *containers: str, **labels: str) -> FakePod:
        """A pod that runs, with these containers."""
        pod = FakePod(self.top, namespace, name, labels)
        pod.make()
        for container in containers:
            pod.add(container)
            pod.make(container)
        self.runtime.pods.append(pod)
        return pod


def move(puppet: Puppet, directory: Path) -> None:
    """Moves a process into a cgroup."""
    (directory / "cgroup.procs").write_text(str(puppet.pid))


def as_api(pod: FakePod, owner: tuple[str, str] | None = None, version: int = 1) -> dict[str, Any]:
    """A pod in the form of the API (core/v1 Pod)."""
    owners = [{"kind": owner[0], "name": owner[1], "controller": True}] if owner else []
    return {
        "metadata": {
            "name": pod.name,
            "namespace": pod.namespace,
            "uid": pod.uid,
            "labels": pod.labels,
            "annotations": pod.annotations,
            "ownerReferences": owners,
            "resourceVersion": str(version),
        },
        "status": {
            "containerStatuses": [
                {"name": name, "containerID": f"containerd://{each}"}
                for name, each in pod.containers.items()
            ]
        },
    }


class ApiServer:
    """Lists and watches pods over HTTP, as the API server does, or over HTTPS with the CERTIFICATE
    and the key in two files."""

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        self.items: list[Any] = []
        self.events: list[Any] = []  # of watches that are open, and to come; bytes are a line
        self.first: list[Any] = []  # events with which each watch begins
        self.ends_watches = False  # once they have said what there is
        self.requests: list[str] = []
        self.tokens: list[str] = []
        self._stopping = Event()
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                api.requests.append(self.path)
                api.tokens.append(self.headers.get("Authorization", ""))
                if "watch" in parse_qs(urlsplit(self.path).query):
                    self._watch()
                    return
                body = json.dumps(
                    {"metadata": {"resourceVersion": "7"}, "items": api.items}
                ).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _watch(self) -> None:
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for line in api._lines():
                    self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                    self.wfile.flush()
                if api.ends_watches:
                    self.wfile.write(b"0\r\n\r\n")
                self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        scheme = "https" if certificate else "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,))

    def _lines(self) -> Iterator[bytes]:
        """Of one watch, up to its end."""
        events = list(self.first)
        while True:
            for event in events:
                yield (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n"
            if self.ends_watches and not self.events:
                return
            if self._stopping.wait(0.01):
                return
            events = [self.events.pop(0)] if self.events else []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
