"""One node with a control plane: etcd, the API server, its controllers, the scheduler, containerd
and the kubelet, each a process that this one starts and ends.

They share a network and a mount namespace, which a process of its own keeps and clears away,
however the tests end: `tests.cluster.janitor`. Of the machine, only one directory and a cgroup
change.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from deploy.image import oci
from deploy.image.layer import layer
from tests.cluster.files import ADDRESS, PAUSE, SERVER, SERVICE_ADDRESS, run, write_files
from tests.support import ROOT, wait_until

NODE: Final = "node-a"
_TOOLS: Final = ROOT / "build/kubernetes"
_START_S: Final = 300.0  # a busy machine
_PAUSE_SOURCE: Final = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"


class Running:
    """A process, and what it has printed so far."""

    def __init__(self, process: subprocess.Popen[bytes], out: BinaryIO, error: BinaryIO) -> None:
        self.process = process
        self._out, self._error = out, error

    def lines(self) -> list[dict[str, Any]]:
        """The whole lines, each of which is JSON."""
        whole, _, _ = _written(self._out).rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    @property
    def errors(self) -> str:
        """What is on standard error."""
        return _written(self._error)

    def leave(self, timeout_s: float = 60.0) -> int:
        """Waits until it has ended by itself; its exit status."""
        return self.process.wait(timeout_s)


def _written(file: BinaryIO) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


class Cluster:
    """A running cluster of one node. `built` has Kubernetes' programs, `unpacked` Debian's."""

    def __init__(self, directory: Path, built: Path, unpacked: Path) -> None:
        self.directory = directory
        self.kubeconfig = directory / "kubeconfig"
        self.cgroup = f"coral-cluster-{os.getpid()}"
        self._built, self._unpacked = built, unpacked
        self._processes: list[subprocess.Popen[bytes]] = []
        self._janitor = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.cluster.janitor", directory, self.cgroup],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self._holder = 0

    def start(self) -> None:
        """Starts everything; returns once the node is ready."""
        assert self._janitor.stdout
        self._holder = int(self._janitor.stdout.readline())
        self._make_network()
        write_files(self.directory, self.cgroup, self._unpacked / "usr/lib/cni")
        self._start("etcd", self._unpacked / "usr/bin/etcd", *self._etcd())
        self._start("apiserver", self._built / "kube-apiserver", *self._apiserver())
        containerd = self._unpacked / "usr/bin/containerd"
        self._start("containerd", containerd, "--config", self.directory / "containerd.toml")
        wait_until(lambda: self.try_kubectl("get", "--raw", "/readyz"), _START_S)
        client = (f"--kubeconfig={self.kubeconfig}", "--leader-elect=false")
        self._start(
            *("controllers", self._built / "kube-controller-manager", *client),
            f"--service-account-private-key-file={self.directory}/accounts.key",
            f"--root-ca-file={self.authority}",
        )
        self._start("scheduler", self._built / "kube-scheduler", *client)
        wait_until((self.directory / "containerd.sock").is_socket, _START_S)
        pause = self._pause_image()
        wait_until(lambda: self._can_import(pause), _START_S)
        self._start("kubelet", self._built / "kubelet", *self._kubelet())
        wait_until(lambda: self.try_kubectl("get", "node", NODE), _START_S)
        self.kubectl("wait", "--for=condition=Ready", f"node/{NODE}", f"--timeout={_START_S:g}s")

    @property
    def authority(self) -> Path:
        """The certificates that the API server's own can be checked with."""
        return self.directory / "apiserver/apiserver.crt"

    def _make_network(self) -> None:
        for command in (
            ("link", "add", "node", "type", "veth", "peer", "name", "nobody"),
            ("link", "set", "nobody", "up"),
            ("address", "add", f"{ADDRESS}/24", "dev", "node"),
            # Nobody forwards what is sent to services: that of the API server is the node itself.
            ("address", "add", f"{SERVICE_ADDRESS}/32", "dev", "lo"),
            ("link", "set", "node", "up"),
            ("route", "add", "default", "dev", "node"),  # the kubelet looks for one
        ):
            run(*self.inside("ip", *command))

    def inside(self, *command: str | Path) -> list[str | Path]:
        """The command line that runs COMMAND in the node's network."""
        return ["nsenter", f"--net=/proc/{self._holder}/ns/net", *command]

    def _start(self, name: str, *command: str | Path) -> None:
        """Starts one of the parts."""
        path = f"{self._unpacked}/usr/bin:{os.environ['PATH']}"  # containerd's shim
        with (self.directory / f"{name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    self.inside(f"--mount=/proc/{self._holder}/ns/mnt", *command),
                    stdout=log, stderr=log, stdin=subprocess.DEVNULL, process_group=0,
                    env={**os.environ, "PATH": path},
                )
            )  # fmt: skip

    def _etcd(self) -> list[str]:
        clients, peers = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
        return [
            *(f"--data-dir={self.directory}/etcd", "--unsafe-no-fsync"),
            *(f"--listen-client-urls={clients}", f"--advertise-client-urls={clients}"),
            *(f"--listen-peer-urls={peers}", f"--initial-advertise-peer-urls={peers}"),
            f"--initial-cluster=default={peers}",
        ]  # fmt: skip

    def _apiserver(self) -> list[str]:
        at = self.directory
        return [
            *("--etcd-servers=http://127.0.0.1:2379", "--service-cluster-ip-range=10.214.0.0/24"),
            *(f"--advertise-address={ADDRESS}", "--bind-address=0.0.0.0", "--secure-port=443"),
            *(f"--cert-dir={at}/apiserver", f"--token-auth-file={at}/tokens.csv"),
            *("--authorization-mode=RBAC", "--allow-privileged=true", "--profiling=false"),
            "--kubelet-preferred-address-types=InternalIP",
            f"--service-account-issuer={SERVER}",
            f"--service-account-key-file={at}/accounts.pub",
            f"--service-account-signing-key-file={at}/accounts.key",
        ]  # fmt: skip

    def _kubelet(self) -> list[str]:
        at = self.directory
        return [
            *(f"--kubeconfig={self.kubeconfig}", f"--config={at}/kubelet.yaml"),
            *(f"--hostname-override={NODE}", f"--node-ip={ADDRESS}", f"--root-dir={at}/kubelet"),
            "--container-runtime=remote",
            f"--container-runtime-endpoint=unix://{at}/containerd.sock",
            f"--cert-dir={at}/kubelet-certificates",
        ]  # fmt: skip

    def _pause_image(self) -> Path:
        """An image of the one program that every pod starts with."""
        root = self.directory / "pause"
        root.mkdir(exist_ok=True)
        source = self.directory / "pause.c"
        source.write_text(_PAUSE_SOURCE)
        run("cc", "-static", "-Os", "-o", root / "pause", source)
        path = self.directory / "pause.tar"
        oci.write(
            oci.image(PAUSE, layer(root), os.uname().machine, {}, entrypoint=["/pause"]), path
        )
        return path

    def _can_import(self, archive: Path) -> bool:
        ctr = (self._unpacked / "usr/bin/ctr", "--address", self.directory / "containerd.sock")
        command = ("--namespace", "k8s.io", "images", "import", archive)
        return subprocess.run([*ctr, *command], check=False, capture_output=True).returncode == 0

    def load(self, archive: Path) -> None:
        """Gives the node an image."""
        assert self._can_import(archive), (self.directory / "containerd.log").read_text()[-2000:]

    def try_kubectl(self, *arguments: str | Path) -> str:
        """What kubectl prints; nothing, if it fails."""
        done = self._kubectl(*arguments)
        return done.stdout if done.returncode == 0 else ""

    def kubectl(self, *arguments: str | Path, said: str | None = None) -> str:
        """What kubectl prints, given SAID on its input."""
        done = self._kubectl(*arguments, said=said)
        assert done.returncode == 0, f"{arguments}: {done.stderr}\n{done.stdout}"
        return done.stdout

    def _kubectl(
        self, *arguments: str | Path, said: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = self.inside(_TOOLS / "kubectl", f"--kubeconfig={self.kubeconfig}", *arguments)
        return subprocess.run(
            command, input=said, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def helm(self, *arguments: str | Path) -> str:
        """What helm prints."""
        return run(*self.inside(_TOOLS / "helm", f"--kubeconfig={self.kubeconfig}", *arguments))

    def begin_kubectl(self, *arguments: str | Path) -> AbstractContextManager[Running]:
        """kubectl, for the duration of the block."""
        return self.begin(_TOOLS / "kubectl", f"--kubeconfig={self.kubeconfig}", *arguments)

    @contextmanager
    def begin(
        self, *command: str | Path, environment: Mapping[str, str] | None = None
    ) -> Iterator[Running]:
        """COMMAND in the node's network, for the duration of the block."""
        with (
            tempfile.TemporaryFile(dir=self.directory) as out,
            tempfile.TemporaryFile(dir=self.directory) as error,
        ):
            process = subprocess.Popen(
                self.inside(*command), stdout=out, stderr=error,
                env={**os.environ, **(environment or {})},
            )  # fmt: skip
            try:
                yield Running(process, out, error)
            finally:
                process.terminate()
                process.wait()

    def get(self, *arguments: str) -> Any:
        """What kubectl gets, as data."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def stop(self) -> None:
        """Ends every process of the cluster and removes what it made."""
        self._janitor.communicate()
        for process in self._processes:
            process.wait()


def unpacked(cache: Path, packages: Sequence[str]) -> Path:
    """Debian's PACKAGES, unpacked below CACHE: installed they would start services of their own."""
    target = cache / "unpacked"
    if not target.exists():
        work = Path(tempfile.mkdtemp(dir=cache))
        apt = ("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download")
        subprocess.run([*apt, *packages], cwd=work, check=True)
        for package in work.glob("*.deb"):
            run("dpkg-deb", "--extract", package, work / "root")
        (work / "root").rename(target)
        shutil.rmtree(work)
    return target


@contextmanager
def cluster(cache: Path) -> Iterator[Cluster]:
    """A cluster for the duration of the block, from the programs in CACHE, which are built if they
    are not there."""
    kubernetes = cache / "kubernetes"
    kubernetes.mkdir(parents=True, exist_ok=True)
    command = ("nice", "-n", "19", ROOT / "tests/cluster/kubernetes", kubernetes)
    subprocess.run(command, check=True)
    programs = unpacked(cache, ("containerd", "containernetworking-plugins", "etcd-server"))
    # Short: sockets' paths have at most 107 bytes.
    running = Cluster(Path(tempfile.mkdtemp(prefix="cc-", dir=cache)), kubernetes / "bin", programs)
    try:
        running.start()
        yield running
    finally:
        running.stop()
