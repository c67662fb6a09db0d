"""Callers of a real agent, among them other users of this machine, and calls of every method."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.certificates import Authority, Pair
from tests.support import PATIENCE, SERVICE

OK = grpc.StatusCode.OK

# Connects to a unix socket for whoever connects to it: the kernel vouches for the user that it runs
# as. It needs nothing that another user may not be able to read.
_PROXY = """
import socket, sys, threading

def pump(source, sink):
    try:
        while part := source.recv(65536):
            sink.sendall(part)
    except OSError:
        pass
    for each in (source, sink):
        try:
            each.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True:
    client, _ = listener.accept()
    agent = socket.socket(socket.AF_UNIX)
    agent.connect(sys.argv[1])
    for pair in ((client, agent), (agent, client)):
        threading.Thread(target=pump, args=pair, daemon=True).start()
"""


@contextmanager
def as_user(uid: int, address: str) -> Iterator[str]:
    """An address at which one is the user UID to the agent at the unix socket ADDRESS, which that
    user must be able to reach."""
    process = subprocess.Popen(
        [
            *(os.path.realpath(sys.executable), "-I", "-S", "-c", _PROXY),
            address.removeprefix("unix:"),
        ],
        user=uid, group=uid, extra_groups=(), cwd="/", env={}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            assert process.stdout
            yield f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


@contextmanager
def directory_for_all() -> Iterator[Path]:
    """A directory that every user may enter, and only root may write."""
    directory = Path(tempfile.mkdtemp(prefix="coral-test-"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        rmtree(directory)


@dataclass(frozen=True)
class Who:
    """A caller: where it finds the agent, the token that it sends and, over TLS, the authority that
    it trusts and the certificate that it shows."""

    address: str
    token: str = ""
    authority: Authority | None = None
    shows: Pair | None = None

    def channel(self) -> grpc.Channel:
        """A connection of its own."""
        if not self.authority:
            return grpc.insecure_channel(self.address)
        own = (self.shows.key_pem, self.shows.chain_pem) if self.shows else (None, None)
        credentials = grpc.ssl_channel_credentials(self.authority.pem, *own)
        return grpc.secure_channel(self.address, credentials)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of its calls."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def call(self, method: str, request: Message) -> Any:
        """A unary call; raises grpc.RpcError."""
        with self.channel() as channel:
            return self._bound(channel, method)(
                request, metadata=self.metadata, timeout=20 * PATIENCE
            )

    @staticmethod
    def _bound(channel: grpc.Channel, method: str) -> Any:
        types = pb.DESCRIPTOR.services_by_name["EbpfService"].methods_by_name[method]
        kind = channel.unary_stream if types.server_streaming else channel.unary_unary
        return kind(
            f"/{SERVICE}/{method}",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=getattr(pb, types.output_type.name).FromString,
        )

    @contextmanager
    def streaming(self, method: str, request: Message) -> Iterator[Iterator[Any]]:
        """The messages of a streaming call; inside the block it stands. Raises grpc.RpcError."""
        with self.channel() as channel:
            call = self._bound(channel, method)(
                request, metadata=self.metadata, timeout=20 * PATIENCE
            )
            try:
                call.initial_metadata()
                yield call
            finally:
                call.cancel()

    def outcome(self, method: str, request: Message) -> tuple[grpc.StatusCode, str]:
        """The code and the text with which a call of the contract is answered; of a stream, OK as
        soon as it stands."""
        types = pb.DESCRIPTOR.services_by_name["EbpfService"].methods_by_name[method]

        def call() -> None:
            if not types.server_streaming:
                self.call(method, request)
                return
            with self.streaming(method, request) as messages:
                next(messages)  # one that has nothing to deliver says so after a second

        return status_of(call)

    def other(self, name: str) -> grpc.StatusCode:
        """The code of one of the other services' methods."""
        with self.channel() as channel:
            return status_of(lambda: self._other(channel, name))[0]

    def _other(self, channel: grpc.Channel, name: str) -> None:
        options: Mapping[str, Any] = {"metadata": self.metadata, "timeout": 20 * PATIENCE}
        health: Any = health_pb2_grpc.HealthStub(channel)
        if name == "Check":
            health.Check(health_pb2.HealthCheckRequest(), **options)
        elif name == "List":
            call: Any = channel.unary_unary("/grpc.health.v1.Health/List")
            call(b"", **options)
        elif name == "Watch":
            watch = health.Watch(health_pb2.HealthCheckRequest(), **options)
            next(watch)
            watch.cancel()
        else:
            reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            next(reflect(iter([request]), **options))


def status_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """How a call ends."""
    try:
        call()
    except grpc.RpcError as error:
        refusal: Any = error
        return refusal.code(), refusal.details()
    return OK, ""
