"""A real containerd of the test's own, which runs pods over its CRI as a kubelet has it do, on the
host's network and from an image without a registry."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from tests.support import wait_until

IMAGE = "coral.test/programs:1"
_NODE = 2  # NamespaceMode: that of the node
_CONFIG = """
version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = [
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper",
]
[grpc]
  address = "{directory}/cri.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
"""


def field(number: int, value: int | str | bytes | Mapping[str, str]) -> bytes:
    """A field of a protobuf message, as it is on the wire. The CRI's requests have many fields;
    these few are written by hand."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, Mapping):
        return b"".join(field(number, field(1, k) + field(2, v)) for k, v in value.items())
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def image(programs: Mapping[str, Path], entrypoint: str) -> bytes:
    """An archive of an image with PROGRAMS, which are linked statically, in its root."""
    layer = _tar({name: path.read_bytes() for name, path in programs.items()})
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": [f"/{entrypoint}"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{_digest(layer)}"]},
        }
    ).encode()
    manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    return _tar(
        {
            "config.json": config,
            "layer.tar": layer,
            "manifest.json": json.dumps(manifest).encode(),
        }
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tar(files: Mapping[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


@dataclass
class Containerd:
    """A containerd that runs."""

    socket: Path
    channel: grpc.Channel
    sandboxes: list[tuple[str, bytes]]

    def call(self, method: str, request: bytes) -> bytes:
        """A call of its CRI."""
        call: Any = self.channel.unary_unary(f"/runtime.v1.RuntimeService/{method}")
        answer: bytes = call(request, timeout=60)
        return answer

    def run_pod(
        self, namespace: str, name: str, uid: str, cgroup: str, labels: Mapping[str, str]
    ) -> str:
        """Runs a pod on the host's network, whose cgroup is CGROUP; its sandbox's id."""
        namespaces = field(1, field(1, _NODE) + field(2, _NODE) + field(3, _NODE))
        config = (
            field(1, field(1, name) + field(2, uid) + field(3, namespace))
            + field(6, labels)
            + field(8, field(1, cgroup) + field(2, namespaces))
        )
        sandbox = self.call("RunPodSandbox", field(1, config))[2:].decode()
        self.sandboxes.append((sandbox, config))
        return sandbox

    def create(self, sandbox: str, name: str, *command: str) -> str:
        """Makes a container in a pod, and starts nothing; its id."""
        config = (
            field(1, field(1, name))
            + field(2, field(1, IMAGE))
            + b"".join(field(3, word) for word in command)
            + field(15, field(2, field(3, field(1, _NODE) + field(2, _NODE) + field(3, _NODE))))
        )
        of_pod = dict(self.sandboxes)[sandbox]
        request = field(1, sandbox) + field(2, config) + field(3, of_pod)
        return self.call("CreateContainer", request)[2:].decode()

    def start(self, container: str) -> None:
        """Starts it."""
        self.call("StartContainer", field(1, container))


@contextmanager
def containerd(binaries: Path, directory: Path, archive: bytes) -> Iterator[Containerd]:
    """The containerd of BINARIES with one image, for the duration of the block."""
    config = directory / "config.toml"
    config.write_text(_CONFIG.format(directory=directory, image=IMAGE))
    (directory / "image.tar").write_bytes(archive)
    path = f"{binaries}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environment = {"PATH": path, "LC_ALL": "C"}
    socket = directory / "cri.sock"
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [binaries / "containerd", "-c", config], stdout=log, stderr=log, env=environment
        )
    try:
        wait_until(lambda: socket.exists() or process.poll() is not None, 60)
        load = [binaries / "ctr", "--address", socket, "-n", "k8s.io", "images", "import"]
        command = [*map(str, load), "--snapshotter", "native", str(directory / "image.tar")]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            running = Containerd(socket, channel, [])
            try:
                yield running
            finally:
                for sandbox, _ in running.sandboxes:
                    running.call("StopPodSandbox", field(1, sandbox))
                    running.call("RemovePodSandbox", field(1, sandbox))
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(directory / "state", ignore_errors=True)
